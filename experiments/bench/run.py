"""Whole runs beside Mammoth's: seconds from the start of a process to its result, and of the steps alone.

    python -m experiments.bench.run --pack=mnist.npz [--mammoth=CHECKOUT --peer_python=PEERS_ENV/bin/python]
        [--protocols=split_mnist_mammoth:er-200,permuted_mnist_mammoth:er-500] [--counts=1,5] [--rounds=3] [--json=FILE]

Every round runs each side once, in turn, on one core with one thread and on all cores: jaxcl with an empty cache of compiled
programs (`cold`) and with the one that this has left (`warm`), Mammoth's own strategy and buffer in the plain loop of
`experiments/bench/peers/mammoth_accuracy.py`, on the same images. Several seeds: jaxcl's go together (`--vmap`), Mammoth's one
after the other in one process, since it has no other way. `steps` are the seconds of jaxcl's phases of a step, and of Mammoth's
runs without its imports and its reading of the data; `times_faster` is Mammoth's median over jaxcl's.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Annotated, Any

from experiments.bench import harness
from experiments.pages.page import ROOT, Json
from experiments.studies.mammoth import mammoth_protocol
from jaxcl.check import refused
from jaxcl.errors import UserError
from jaxcl.runs.steps import STEPPING

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def measure(
    *,
    pack: Annotated[str, "npz file with the images"] = "",
    mammoth: Annotated[str, "a checkout of Mammoth; without it jaxcl runs alone"] = "",
    peer_python: Annotated[str, "interpreter that has PyTorch"] = sys.executable,
    protocols: Annotated[tuple[str, ...], "CONFIG:ROW of configs/"] = (
        "split_mnist_mammoth:er-200",
        "permuted_mnist_mammoth:er-500",
    ),
    counts: Annotated[tuple[int, ...], "numbers of seeds"] = (1, 5),
    rounds: Annotated[int, "runs of each kind"] = 3,
) -> Json:
    if not pathlib.Path(pack).is_file():
        raise refused("--pack", pack, "an npz file")
    cores = sorted(os.sched_getaffinity(0))
    found = []
    for name in protocols:
        for count in counts:
            for used in dict.fromkeys((1, len(cores))):
                case = Case(name, os.path.abspath(pack), count, cores[:used], mammoth, peer_python)
                found.append({"protocol": name, "seeds": count, "cores": used, **one_case(case, rounds)})
                harness.show(found[-1])
    return {"runs": found}


class Case:
    """One protocol, by so many seeds on these cores."""

    def __init__(self, name: str, pack: str, count: int, cores: list[int], mammoth: str, peer_python: str):
        module, _, row = name.partition(":")
        if not row or not (ROOT / "configs" / f"{module}.py").is_file():
            raise refused("--protocols", name, "CONFIG:ROW, such as split_mnist_mammoth:er-200")
        self.config = importlib.import_module(f"configs.{module}").get_config(row)
        self.config.data.source = f"npz:{pack}"
        self.file, self.count, self.cores = f"configs/{module}.py:{row}", count, cores
        self.mammoth, self.peer_python = mammoth, peer_python

    def run(self, command: list[str], given: str | None = None) -> tuple[float, str]:
        """Seconds of a process from its start to its end, and what it has printed."""
        environment = dict(os.environ)
        if len(self.cores) == 1:
            environment |= dict.fromkeys(THREADS, "1")
        begin = time.perf_counter()
        done = subprocess.run(
            ["taskset", "-c", ",".join(map(str, self.cores)), *command],
            cwd=ROOT,
            env=environment,
            input=given,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - begin
        if done.returncode:
            raise UserError(f"{' '.join(command[:4])} ended with status {done.returncode}: {done.stderr[-300:]}")
        return seconds, done.stdout

    def ours(self, folder: pathlib.Path, cache: pathlib.Path) -> dict[str, float]:
        """One command of jaxcl, whose programs are kept in `cache`."""
        strategy = self.config.strategy
        options = [f"--config={self.file}", f"--config.data.source={self.config.data.source}", f"--workdir={folder}"]
        options += [f"--strategies={strategy}", f"--seeds={self.count}", f"--compilation_cache={cache}"]
        options += ["--vmap"] if self.count > 1 else []
        seconds, _ = self.run([sys.executable, "-m", "experiments.compare", *options])
        results = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{strategy}/seed_*/result.json"))]
        first, accuracy = results[0], [result["average_accuracy"] for result in results]
        steps = sum(first["seconds_by_phase"].get(phase, 0.0) for phase in STEPPING)
        return {"whole": seconds, "steps": steps, "accuracy": sum(accuracy) / len(accuracy), **first["compilation"]}

    def theirs(self) -> dict[str, float]:
        """One process of Mammoth's strategy."""
        asked = {**mammoth_protocol(self.config), "path": self.mammoth, "seeds": list(range(self.count))}
        command = [self.peer_python, "-m", "experiments.bench.peers.mammoth_accuracy"]
        seconds, text = self.run(command, json.dumps(asked))
        runs = [json.loads(line) for line in text.splitlines()]
        steps, accuracy = (sum(run[name] for run in runs) for name in ("seconds", "accuracy"))
        return {"whole": seconds, "steps": steps, "accuracy": accuracy / len(runs)}


def one_case(case: Case, rounds: int) -> Json:
    """Every side in turn, in new folders; medians and spreads of seconds, and how much faster than Mammoth."""
    seconds: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            for kind in ("cold", "warm"):  # the cache that the first fills is the second's
                seconds.setdefault(kind, []).append(case.ours(folder / kind, folder / "cache"))
            if case.mammoth:
                seconds.setdefault("mammoth", []).append(case.theirs())
    names: dict[str, Any] = {kind: found[0] for kind, found in seconds.items()}
    sides = {
        kind: {name: harness.summary([one[name] for one in seconds[kind]]) for name in first}
        for kind, first in names.items()
    }
    if not case.mammoth:
        return {"sides": sides}
    ratio = {
        kind: {name: sides["mammoth"][name]["median"] / sides[kind][name]["median"] for name in ("whole", "steps")}
        for kind in ("cold", "warm")
    }
    return {"sides": sides, "times_faster": ratio}


if __name__ == "__main__":
    harness.run(measure)
