"""Insert and draw of jaxcl's buffer beside its peers: time, flatness, temporaries, memory, and the goals set for them.

    python -m experiments.bench.buffer --json=runs/bench_buffer.json [--devices=8]

Peers (flashbax, brax, Mammoth, Avalanche) are optional, see `experiments/bench/peers`; those not there are reported missing:

    ... --peer_python=PEERS_ENV/bin/python --mammoth=MAMMOTH_CHECKOUT --avalanche=AVALANCHE_CHECKOUT

Every contender runs in a process of its own. A peer and jaxcl on as many devices take turns, each blocking once a step,
so that whatever else the machine does hits both, and their ratio is taken turn by turn. jaxcl's capacities take turns
too. Five to ten minutes on two cores with every peer; at 262,144 rows a device the largest need 8 GB.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Annotated

from matplotlib.figure import Figure

from experiments.bench import harness
from experiments.bench.peers.protocol import Result
from experiments.pages.page import ROOT, Json
from jaxcl import cli
from jaxcl.check import at_least, check
from jaxcl.errors import UserError


@dataclasses.dataclass(frozen=True)
class Contender:
    """A buffer to measure: its module in `experiments/bench/peers`, how many devices it uses, what it needs to run."""

    name: str
    module: str
    devices: int
    python: str = sys.executable
    path: str | None = None


class Worker:
    """A contender's process with a full buffer, measuring when told to. `result.missing` says why it cannot."""

    def __init__(self, contender: Contender, capacity: int, batch: int) -> None:
        command = [contender.python, "-m", f"experiments.bench.peers.{contender.module}", f"--peer={contender.name}"]
        command += [f"--devices={contender.devices}", f"--capacity={capacity}", f"--batch={batch}"]
        command += [f"--path={contender.path}"] if contender.path else []
        self.turns: list[list[float]] = []
        self.result = Result(contender.name, capacity, contender.devices, batch)
        # Kept to tell why a worker ended; a file, because a full pipe would block it.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {name: x for name, x in os.environ.items() if name != "NPROC"}  # every worker has its own devices
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=self._errors, text=True
        )
        if line := self._read():
            self.result = Result(**json.loads(line))

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            self.result.missing = f"ended with exit code {self._process.wait()}: {last}"
        return line

    def take_turn(self, seconds: float) -> None:
        if self.result.missing:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and reading tells why
            print(seconds, file=self._process.stdin, flush=True)
        if line := self._read():
            self.turns.append(json.loads(line))

    def close(self) -> Result:
        """Ends the process; the result with the times of all turns."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._errors.close()
        if not self.result.missing:
            self.result.insert_draw_ms = harness.summary([t for turn in self.turns for t in turn])
        return self.result


def take_turns(workers: Sequence[Worker], rounds: int, seconds: float) -> list[Result]:
    """Forward and backward in turn, so that a drift of the machine favours none; then the workers' results."""
    for i in range(rounds):
        for worker in workers[:: 1 if i % 2 == 0 else -1]:
            worker.take_turn(seconds)
    return [worker.close() for worker in workers]


def turn_ratio(over: Worker, under: Worker) -> float:
    """Median over the rounds of the ratio of the turns' medians."""
    pairs = zip(over.turns, under.turns, strict=True)
    return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)


def measure(
    *,
    capacities: Annotated[tuple[int, ...], "rows a device"] = (1024, 32768, 262144),
    batch: Annotated[int, "rows in and rows out, a device and step"] = 64,
    rounds: Annotated[int, "turns of each contender"] = 5,
    seconds: Annotated[float, "length of a turn"] = 0.5,
    peer_python: Annotated[str, "interpreter that has the peers' packages"] = sys.executable,
    mammoth: Annotated[str | None, "checkout of aimagelab/mammoth"] = None,
    avalanche: Annotated[str | None, "checkout of ContinualAI/avalanche"] = None,
) -> Json:
    many = cli.DEVICES.value or 8
    check("--devices", many, at_least(2))
    for capacity in capacities:
        check("--capacities", capacity, at_least(batch))
    if shutil.which(peer_python) is None:
        raise UserError(f"--peer_python: {peer_python} cannot be run")
    own = {n: Contender("jaxcl", "jax_peers", n) for n in (1, many)}
    weighted = Contender("jaxcl_weighted", "jax_peers", 1)
    peers = [
        Contender("flashbax", "jax_peers", 1, peer_python),
        Contender("flashbax_prioritised", "jax_peers", 1, peer_python),
        Contender("brax", "jax_peers", 1, peer_python),
        Contender("brax_sharded", "jax_peers", many, peer_python),
        Contender("mammoth", "torch_peers", 1, peer_python, mammoth),
        Contender("mammoth_late", "torch_peers", 1, peer_python, mammoth),
        Contender("avalanche", "torch_peers", 1, peer_python, avalanche),
    ]
    print(f"{'':<13} devices capacity     median        p10        p90      n  bytes/rows    temporaries")
    results: list[Result] = []
    flat: dict[int, float | None] = {}
    pairs: list[Json] = []
    for devices, contender in own.items():
        workers = [Worker(contender, capacity, batch) for capacity in capacities]
        some = take_turns(workers, rounds, seconds)
        complete = len(some) > 1 and not any(r.missing for r in some)
        flat[devices] = max(turn_ratio(a, b) for a in workers for b in workers) if complete else None
        results += some
        print(*map(describe, some), sep="\n", flush=True)
    for peer in peers:
        for capacity in capacities:
            workers = [Worker(peer, capacity, batch)]
            ours = weighted if peer.name == "flashbax_prioritised" else own[peer.devices]
            workers += [] if workers[0].result.missing else [Worker(ours, capacity, batch)]
            result, *beside = take_turns(workers, rounds, seconds)
            results.append(result)
            pair = compare(*workers) if beside and not (result.missing or beside[0].missing) else None
            pairs += [pair] if pair else []
            print(describe(result), f"{pair['jaxcl_over_peer']:.4g} of its time" if pair else "", flush=True)
    aims = list(goals(results, flat, pairs))
    for aim in aims:
        value = "not measured" if aim["value"] is None else f"{aim['value']:.4g}"
        print(f"{aim['goal']} {aim['limit']:g}: {value}{ {None: '', True: ', met', False: ', NOT MET'}[aim['met']] }")
    return {"results": [dataclasses.asdict(r) for r in results], "pairs": pairs, "goals": aims}


def compare(peer: Worker, own: Worker) -> Json:
    """A peer and jaxcl that took turns."""
    theirs, ours = peer.result, own.result
    assert theirs.insert_draw_ms and ours.insert_draw_ms
    return {
        "peer": theirs.name,
        "jaxcl": ours.name,
        "capacity": theirs.capacity,
        "devices": theirs.devices,
        "peer_ms": theirs.insert_draw_ms["median"],
        "jaxcl_ms": ours.insert_draw_ms["median"],
        "jaxcl_over_peer": turn_ratio(own, peer),
    }


def goal(text: str, value: float | None, limit: float, *, least: bool = False) -> Json:
    """What is aimed at, what came out (the worst over capacities), and whether it is met; None where not measured."""
    met = None if value is None else value >= limit if least else value <= limit
    return {"goal": f"{text}, at {'least' if least else 'most'}", "value": value, "limit": limit, "met": met}


def goals(results: Sequence[Result], flat: dict[int, float | None], pairs: Sequence[Json]) -> Iterable[Json]:
    for devices, slowest in flat.items():
        yield goal(f"slowest over fastest capacity, {devices} device(s)", slowest, 1.3)
        measured = [r for r in results if (r.name, r.devices) == ("jaxcl", devices) and not r.missing]
        temps = [r.temp_bytes for r in measured if r.temp_bytes is not None]
        growth = max(temps) - min(temps) if len(temps) > 1 else None
        yield goal(f"growth of temporaries with capacity, bytes, {devices} device(s)", growth, 0)
        excess = [abs(r.bytes / r.bytes_expected - 1) for r in measured if r.bytes and r.bytes_expected]
        yield goal(f"memory beyond the rows, fraction, {devices} device(s)", max(excess, default=None), 0.05)
    worst = {p["peer"]: max(q["jaxcl_over_peer"] for q in pairs if q["peer"] == p["peer"]) for p in pairs}
    yield goal("time over flashbax's, one device", worst.get("flashbax"), 1.25)
    yield goal("time over flashbax's, weighted, one device", worst.get("flashbax_prioritised"), 1.25)
    for peer in ("mammoth", "mammoth_late", "avalanche"):
        yield goal(f"times faster than {peer}", 1 / worst[peer] if peer in worst else None, 20.0, least=True)


def describe(r: Result) -> str:
    """One line of the table."""
    head = f"{r.name:<13} {r.devices:>2} {r.capacity:>8}"
    if r.insert_draw_ms is None:
        return f"{head}  missing: {r.missing}"
    t = r.insert_draw_ms
    rows = r.bytes / r.bytes_expected if r.bytes and r.bytes_expected else float("nan")
    temp = "-" if r.temp_bytes is None else f"{r.temp_bytes:,}"
    return f"{head} {t['median']:>10.3f} {t['p10']:>10.3f} {t['p90']:>10.3f} {t['n']:>6} {rows:>7.3f} {temp:>14}"


def plot(record: Json) -> Figure:
    """Median step time against capacity, p10 to p90 as bars, one line a contender."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[tuple[str, int], list[Json]] = {}
    for one in record["results"]:
        if one["insert_draw_ms"]:
            lines.setdefault((one["name"], one["devices"]), []).append(one)
    for (name, devices), several in lines.items():
        times = [one["insert_draw_ms"] for one in several]
        bars = [[t["median"] - t["p10"] for t in times], [t["p90"] - t["median"] for t in times]]
        label = f"{name}, {devices} device{'s' if devices > 1 else ''}"
        x, y = [one["capacity"] for one in several], [t["median"] for t in times]
        axes.errorbar(x, y, bars, marker="o", capsize=2, linewidth=2 if name == "jaxcl" else 1, label=label)
    axes.set(xscale="log", yscale="log", xlabel="capacity (rows a device)", ylabel="insert + draw (ms a step)")
    batch = record["results"][0]["batch"]
    axes.set_title(f"{batch} rows in, {batch} rows out, a device and step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    harness.run(measure, plot)
