"""Runs our side of a published protocol and sets it beside the reference: JSON in experiments/results, docs/benchmarks.md.

    python -m experiments.studies.references --protocol=split_mnist_mammoth --workdir=DIR [--data_dir=TFDS_DIR]
        [--source=npz:FILE] [--rows=er-200,der-200] [--seeds=5]
    python -m experiments.studies.references --protocol=split_cifar10_small --source=npz:FILE --mammoth=CHECKOUT
        [--peer_python=PEERS_ENV/bin/python]      # the reference's side, by experiments/bench/peers/mammoth_accuracy.py
    python -m experiments.studies.references        # only fills docs/benchmarks.md anew, from the JSON files

The rows of a protocol are those of configs/PROTOCOL.py. What the reference reached stands in
experiments/results/PROTOCOL.reference.json.
"""

import importlib
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments.pages import page
from experiments.pages.page import Json
from experiments.studies.grid import ROWS, Grid
from experiments.studies.mammoth import mammoth_protocol
from jaxcl import cli, summaries
from jaxcl.errors import UserError

PAGE = page.ROOT / "docs" / "benchmarks.md"
SEEDS = 5  # of each row, from 0

PROTOCOL = flags.DEFINE_string("protocol", None, "a config file of configs/ with rows, without .py")
SOURCE = flags.DEFINE_string("source", None, "config.data.source, where the protocol's own is not to be used")
DATA_DIR = flags.DEFINE_string("data_dir", None, "config.data.data_dir")
MAMMOTH = flags.DEFINE_string("mammoth", None, "a checkout of Mammoth: runs the reference's side instead of ours")
PEER_PYTHON = flags.DEFINE_string("peer_python", sys.executable, "interpreter that has PyTorch, with --mammoth")


def main() -> None:
    if PROTOCOL.value is not None:
        if not (page.ROOT / "configs" / f"{PROTOCOL.value}.py").is_file():
            raise UserError(f"--protocol: there is no configs/{PROTOCOL.value}.py")
        seeds = list(range(cli.seeds(SEEDS, least=2)))  # a deviation needs two
        if MAMMOTH.value is None:
            run_ours(PROTOCOL.value, pathlib.Path(cli.required(cli.WORKDIR)), seeds)
        else:
            run_reference(PROTOCOL.value, MAMMOTH.value, seeds)
    write()
    print(PAGE.relative_to(page.ROOT))


def run_ours(protocol: str, workdir: pathlib.Path, seeds: list[int]) -> None:
    """Runs the rows asked for and puts them into the protocol's JSON file, beside those already there."""
    module = importlib.import_module(f"configs.{protocol}")
    for row in ROWS.value or module.ROWS:
        one = Grid(config_of(module, row), workdir, options={"progress": False})
        runs = [one.runs(row, {"seed": seed, "data.scenario_seed": seed}, seeds=1)[0] for seed in seeds]
        found = summary(runs)
        print(f"{row}: {figure(found)}", flush=True)
        rows = ours_of(protocol) | {row: found}
        path = page.RESULTS / f"{protocol}.json"
        path.write_text(page.as_json({name: rows[name] for name in module.ROWS if name in rows}))


def run_reference(protocol: str, checkout: str, seeds: list[int]) -> None:
    """Runs Mammoth on the rows asked for and puts them into the reference's JSON file."""
    module = importlib.import_module(f"configs.{protocol}")
    for row in ROWS.value or module.ROWS:
        asked = {**mammoth_protocol(config_of(module, row)), "path": checkout, "seeds": seeds}
        command = [PEER_PYTHON.value, "-m", "experiments.bench.peers.mammoth_accuracy"]
        done = subprocess.run(command, cwd=page.ROOT, input=json.dumps(asked), stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"--mammoth: the run of {row} ended with status {done.returncode}")
        runs = [json.loads(line) for line in done.stdout.splitlines()]
        found = accuracies([100 * run["accuracy"] for run in runs]) | {"version": runs[0]["version"]}
        print(f"{row}: {figure(found)}", flush=True)
        reference = page.load(f"{protocol}.reference")
        reference["rows"][row] = found
        (page.RESULTS / f"{protocol}.reference.json").write_text(page.as_json(reference))


def config_of(module: Any, row: str) -> ConfigDict:
    config = module.get_config(row)
    config.data.source = SOURCE.value or config.data.source
    config.data.data_dir = DATA_DIR.value
    return config


def accuracies(accuracy: list[float]) -> Json:
    """Final accuracy of each seed in percent, their mean and sample deviation."""
    mean, deviation = summaries.mean_and_deviation(accuracy)
    return {"accuracy": [round(a, 3) for a in accuracy], "mean": round(mean, 3), "std": round(deviation, 3)}


def summary(runs: list[Json]) -> Json:
    """What is kept of the runs of one row."""
    return accuracies([100 * run["average_accuracy"] for run in runs]) | {
        "seconds": round(float(np.median([run["seconds"] for run in runs])), 1),
        "devices": runs[0]["devices"],
        "versions": runs[0]["versions"],
    }


def figure(row: Json) -> str:
    return f"{row['mean']:.2f} ± {row['std']:.2f}"


def ours_of(protocol: str) -> Json:
    """Row -> what ours reached; {} before the first run."""
    return page.load(protocol) if (page.RESULTS / f"{protocol}.json").is_file() else {}


def tables() -> dict[str, str]:
    """Protocol -> its table, of every protocol that has a reference."""
    names = sorted(path.name.removesuffix(".reference.json") for path in page.RESULTS.glob("*.reference.json"))
    references = {name: page.load(f"{name}.reference") for name in names}
    return {name: table(x["rows"], ours_of(name), x["seeds"]) for name, x in references.items()}


def table(reference: Json, ours: Json, seeds: int) -> str:
    rows: list[tuple[Any, ...]] = []
    for name, theirs in reference.items():
        row, count = ours.get(name), len(theirs.get("accuracy", ())) or seeds
        if row is None:
            rows.append((name, figure(theirs), count, "not run", "", "", ""))
            continue
        holds = "yes" if row["mean"] >= theirs["mean"] - theirs["std"] else "**no**"
        rows.append((name, figure(theirs), count, figure(row), len(row["accuracy"]), holds, row["seconds"]))
    return page.table(("row", "reference", "seeds", "ours", "seeds", "holds", "s a run"), rows)


def write() -> None:
    page.fill(PAGE, tables())


if __name__ == "__main__":
    cli.run(main)
