"""Insert and draw of jaxcl's buffer beside its peers: time, flatness, temporaries, memory, and the goals set for them.

    python -m experiments.bench.buffer --json=runs/bench_buffer.json

Peers (flashbax, brax, Mammoth, Avalanche) are optional, see `experiments/peers`; those not there are reported missing:

    ... --peer_python=PEERS_ENV/bin/python --mammoth=MAMMOTH_CHECKOUT --avalanche=AVALANCHE_CHECKOUT

Every contender runs in a process of its own. A peer and jaxcl on as many devices take turns, each blocking once a step,
so that whatever else the machine does hits both, and their ratio is taken turn by turn. jaxcl's capacities take turns
too. Five to ten minutes on two cores with every peer; at 262,144 rows a device the largest need 8 GB.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from experiments.bench.peers.protocol import Result, summary

_JSON = flags.DEFINE_string("json", None, "file to write; the plot goes beside it as .png", required=True)
_CAPACITIES = flags.DEFINE_list("capacities", ["1024", "32768", "262144"], "rows a device")
_DEVICES = flags.DEFINE_integer("devices", 8, "devices of the sharded contenders, fake ones on a CPU", lower_bound=2)
_BATCH = flags.DEFINE_integer("batch", 64, "rows in and rows out, a device and step", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "turns of each contender", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 0.5, "length of a turn", lower_bound=0.0)
_PEER_PYTHON = flags.DEFINE_string("peer_python", sys.executable, "interpreter that has the peers' packages")
_MAMMOTH = flags.DEFINE_string("mammoth", None, "checkout of aimagelab/mammoth")
_AVALANCHE = flags.DEFINE_string("avalanche", None, "checkout of ContinualAI/avalanche")

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A buffer to measure: an adapter of `experiments/peers`, the interpreter it needs, how many devices it uses."""

    name: str
    module: str
    devices: int
    python: str
    path: str | None = None


class Worker:
    """A contender's process with a full buffer, measuring when told to. `result.missing` says why it cannot."""

    def __init__(self, contender: Contender, capacity: int, batch: int) -> None:
        command = [contender.python, "-m", f"experiments.bench.peers.{contender.module}", "--serve"]
        command += [f"--peer={contender.name}", f"--devices={contender.devices}"]
        command += [f"--capacity={capacity}", f"--batch={batch}"]
        command += [f"--path={contender.path}"] if contender.path else []
        self.turns: list[list[float]] = []
        self.result = Result(contender.name, capacity, contender.devices, batch)
        # Kept to tell why a worker ended; a file, because a full pipe would block it.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
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
            self.result.insert_draw_ms = summary([t for turn in self.turns for t in turn])
        return self.result


def take_turns(workers: Sequence[Worker], rounds: int, seconds: float) -> None:
    """Forward and backward in turn, so that a drift of the machine favours none."""
    for i in range(rounds):
        for worker in workers[:: 1 if i % 2 == 0 else -1]:
            worker.take_turn(seconds)


def turn_ratio(over: Worker, under: Worker) -> float:
    """Median over the rounds of the ratio of the turns' medians."""
    pairs = zip(over.turns, under.turns, strict=True)
    return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)


def measure_pair(peer: Contender, jaxcl: Contender, capacity: int) -> tuple[Result, dict[str, Any] | None]:
    """A peer beside jaxcl: its result, and the comparison, None if the peer is missing."""
    worker = Worker(peer, capacity, _BATCH.value)
    if worker.result.missing:
        return worker.close(), None
    beside = Worker(jaxcl, capacity, _BATCH.value)
    take_turns([worker, beside], _ROUNDS.value, _SECONDS.value)
    result, reference = worker.close(), beside.close()
    if result.missing or reference.missing:
        return result, None
    assert result.insert_draw_ms and reference.insert_draw_ms
    return result, {
        "peer": peer.name,
        "capacity": capacity,
        "devices": peer.devices,
        "peer_ms": result.insert_draw_ms["median"],
        "jaxcl_ms": reference.insert_draw_ms["median"],
        "jaxcl_over_peer": turn_ratio(beside, worker),
    }


def measure_capacities(jaxcl: Contender, capacities: Sequence[int]) -> tuple[list[Result], float | None]:
    """jaxcl at all capacities in turns: the results, and the slowest over the fastest, None if there are not two."""
    workers = [Worker(jaxcl, capacity, _BATCH.value) for capacity in capacities]
    take_turns(workers, _ROUNDS.value, _SECONDS.value)
    results = [w.close() for w in workers]
    if len(results) < 2 or any(r.missing for r in results):
        return results, None
    return results, max(turn_ratio(a, b) for a in workers for b in workers)


def goals(
    own: Sequence[Result], flat: dict[int, float | None], pairs: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What is aimed at, what came out (the worst over capacities), and whether it is met; None where not measured."""

    def goal(text: str, value: float | None, limit: float, *, at_least: bool = False) -> dict[str, Any]:
        met = None if value is None else value >= limit if at_least else value <= limit
        return {"goal": text, "value": value, "limit": limit, "met": met}

    def ratios(peer: str) -> list[float]:
        return [p["jaxcl_over_peer"] for p in pairs if p["peer"] == peer]

    out = [goal("time over flashbax's, one device, at most", max(ratios("flashbax"), default=None), 1.25)]
    for peer in ("mammoth", "mammoth_late", "avalanche"):
        worst = max(ratios(peer), default=None)
        out.append(goal(f"times faster than {peer}, at least", worst and 1 / worst, 20.0, at_least=True))
    for devices, ratio in flat.items():
        out.append(goal(f"slowest over fastest capacity, {devices} device(s), at most", ratio, 1.3))
        measured = [r for r in own if r.devices == devices and not r.missing]
        temps = [r.temp_bytes for r in measured if r.temp_bytes is not None]
        growth = max(temps) - min(temps) if len(temps) > 1 else None
        out.append(goal(f"growth of temporaries with capacity, bytes, {devices} device(s), at most", growth, 0))
        excess = [abs(r.bytes / r.bytes_expected - 1) for r in measured if r.bytes and r.bytes_expected]
        out.append(
            goal(f"memory beyond the rows, fraction, {devices} device(s), at most", max(excess, default=None), 0.05)
        )
    return out


def plot(results: Sequence[Result], file: pathlib.Path) -> None:
    """Median step time against capacity, p10 to p90 as bars, one line a contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, devices in dict.fromkeys((r.name, r.devices) for r in results):
        points = [(r.capacity, r.insert_draw_ms) for r in results if (r.name, r.devices) == (name, devices)]
        x = [c for c, t in points if t]
        times = [t for _, t in points if t]
        if not times:
            continue
        median = [t["median"] for t in times]
        bars = [[t["median"] - t["p10"] for t in times], [t["p90"] - t["median"] for t in times]]
        label = f"{name}, {devices} device{'s' if devices > 1 else ''}"
        axes.errorbar(x, median, yerr=bars, marker="o", capsize=2, linewidth=2 if name == "jaxcl" else 1, label=label)
    axes.set(xscale="log", yscale="log", xlabel="capacity (rows a device)", ylabel="insert + draw (ms a step)")
    axes.set_title(f"{_BATCH.value} rows in, {_BATCH.value} rows out, a device and step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def describe(r: Result) -> str:
    """One line of the table."""
    head = f"{r.name:<13} {r.devices:>2} {r.capacity:>8}"
    if r.insert_draw_ms is None:
        return f"{head}  missing: {r.missing}"
    t = r.insert_draw_ms
    rows = r.bytes / r.bytes_expected if r.bytes and r.bytes_expected else float("nan")
    temp = "-" if r.temp_bytes is None else f"{r.temp_bytes:,}"
    return f"{head} {t['median']:>10.3f} {t['p10']:>10.3f} {t['p90']:>10.3f} {t['n']:>6} {rows:>7.3f} {temp:>14}"


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not all(c.isdecimal() and int(c) >= _BATCH.value for c in _CAPACITIES.value):
        raise app.UsageError(f"--capacities: {_CAPACITIES.value} are not all numbers of at least a batch")
    if shutil.which(_PEER_PYTHON.value) is None:
        raise app.UsageError(f"--peer_python: {_PEER_PYTHON.value} cannot be run")
    capacities, many = [int(c) for c in _CAPACITIES.value], _DEVICES.value
    file = pathlib.Path(_JSON.value).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    own = {n: Contender("jaxcl", "jaxcl_peer", n, sys.executable) for n in (1, many)}
    peers = [
        Contender("flashbax", "flashbax_peer", 1, _PEER_PYTHON.value),
        Contender("brax", "brax_peer", 1, _PEER_PYTHON.value),
        Contender("brax_sharded", "brax_peer", many, _PEER_PYTHON.value),
        Contender("mammoth", "mammoth_peer", 1, _PEER_PYTHON.value, _MAMMOTH.value),
        Contender("mammoth_late", "mammoth_peer", 1, _PEER_PYTHON.value, _MAMMOTH.value),
        Contender("avalanche", "avalanche_peer", 1, _PEER_PYTHON.value, _AVALANCHE.value),
    ]

    print(f"{'':<13} devices capacity     median        p10        p90      n  bytes/rows    temporaries")
    own_results: list[Result] = []
    flat: dict[int, float | None] = {}
    for devices, contender in own.items():
        some, flat[devices] = measure_capacities(contender, capacities)
        own_results += some
        print(*map(describe, some), sep="\n", flush=True)
    peer_results: list[Result] = []
    pairs: list[dict[str, Any]] = []
    for peer in peers:
        for capacity in capacities:
            result, pair = measure_pair(peer, own[peer.devices], capacity)
            peer_results.append(result)
            beside = f"   jaxcl beside it: {pair['jaxcl_over_peer']:.4g} of its time" if pair else ""
            print(describe(result) + beside, flush=True)
            pairs += [pair] if pair else []

    results = own_results + peer_results
    aims = goals(own_results, flat, pairs)
    for aim in aims:
        value = "not measured" if aim["value"] is None else f"{aim['value']:.4g}"
        verdict = {None: "", True: ", met", False: ", NOT MET"}[aim["met"]]
        print(f"{aim['goal']} {aim['limit']:g}: {value}{verdict}")
    report = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
        "arguments": {f.name: f.value for f in (_CAPACITIES, _DEVICES, _BATCH, _ROUNDS, _SECONDS)},
        "results": [dataclasses.asdict(r) for r in results],
        "pairs": pairs,
        "goals": aims,
    }
    file.write_text(json.dumps(report, indent=1) + "\n")
    plot(results, file.with_suffix(".png"))
    print(f"wrote {file} and {file.with_suffix('.png')}")


if __name__ == "__main__":
    app.run(main)
