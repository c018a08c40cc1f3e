"""What a peer of the buffer benchmark is, and the loop that measures one in a process of its own.

A step inserts `batch` rows a device into a full buffer and draws as many, and blocks until both are done. Rows are
the same for every peer: seeded 32x32x3 uint8 images with an integer label, handed over in the peer's own array type.

Only the standard library and NumPy are imported here: a peer runs under any interpreter that has its packages.
"""

import abc
import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, ClassVar, TextIO

import numpy as np

ROW_SHAPE = (32, 32, 3)
LABEL_BYTES = 4
CLASSES = 100
BASE_BYTES = 500_000_000  # a Python process with its frameworks
FILL_ROWS = 8192  # rows handed over at once while a buffer is filled

Rows = tuple[np.ndarray, np.ndarray]  # uint8 [n, *row_shape], int32 [n]


class Missing(Exception):
    """This peer cannot run here; the message says why."""


class Peer(abc.ABC):
    """One buffer under measurement.

    Attributes:
      name: as in the report.
      note: how what it does in a step differs from the others, for the report.
      peak: memory it needs at its worst, from the largest resident size seen, in units of `capacity * devices` rows as
        they arrive.
      version: of its package, or commit, and of what it runs on.
      device: where it ran.
    """

    name: ClassVar[str]
    note: ClassVar[str]
    peak: ClassVar[float]
    version: str
    device: str = "host memory, CPU"

    @abc.abstractmethod
    def __init__(self, capacity: int, row_shape: tuple[int, ...], batch: int, devices: int, path: str | None) -> None:
        """`capacity` and `batch` are rows a device. Raises `Missing`, or ImportError, where it cannot run."""

    @abc.abstractmethod
    def fill(self) -> None:
        """Fills the buffer to capacity."""

    @abc.abstractmethod
    def place(self, rows: Rows) -> Any:
        """Rows in the peer's own array type, where the peer wants them."""

    @abc.abstractmethod
    def step(self, batch: Any) -> None:
        """Inserts the batch and draws as many rows; returns when both are done."""

    @abc.abstractmethod
    def bytes(self) -> int:
        """Bytes of the stored rows, over all devices."""

    def temp_bytes(self) -> int | None:
        """Temporary memory of one compiled step; None where there is no compiler to ask."""
        return None


@dataclasses.dataclass
class Result:
    """One line of the benchmark; the fields are the keys of its JSON.

    Attributes:
      capacity: rows a device.
      batch: rows in, and rows out, a device and step.
      insert_draw_ms: median, p10, p90 and n of the step times in milliseconds; None if missing.
      bytes: what the buffer occupies over all devices. bytes_expected: capacity * devices * (row + label).
      temp_bytes: temporaries of one compiled step, if known.
      note: how this one's step differs from the others.
      missing: why there are no figures, or None.
    """

    name: str
    capacity: int
    devices: int
    batch: int
    version: str | None = None
    device: str | None = None
    insert_draw_ms: dict[str, float] | None = None
    bytes: int | None = None
    bytes_expected: int | None = None
    temp_bytes: int | None = None
    note: str = ""
    missing: str | None = None

    def line(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def random_rows(count: int, row_shape: tuple[int, ...], seed: int) -> Rows:
    """`count` seeded random rows and labels."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (count, *row_shape), np.uint8)
    return rows, rng.integers(0, CLASSES, count).astype(np.int32)


def fill_chunks(count: int, row_shape: tuple[int, ...], chunk: int = FILL_ROWS) -> Iterator[Rows]:
    """The `count` rows every buffer is filled with, in equal chunks of at most `chunk` rows (one jit trace)."""
    pieces = next(k for k in range(math.ceil(count / chunk), count + 1) if count % k == 0)
    for i in range(pieces):
        yield random_rows(count // pieces, row_shape, seed=1000 + i)


def summary(times_ms: list[float]) -> dict[str, float]:
    """Median and spread of step times."""
    p10, median, p90 = np.percentile(times_ms, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90), "n": len(times_ms)}


def free_bytes() -> int | None:
    """Main memory that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo") as f:
            lines = dict(line.split(":") for line in f)
    except OSError:
        return None
    return int(lines["MemAvailable"].split()[0]) * 1024


def _build(peer_type: type[Peer], result: Result, path: str | None) -> Peer:
    assert result.bytes_expected is not None
    need, free = BASE_BYTES + int(peer_type.peak * result.bytes_expected), free_bytes()
    if free is not None and need > free:
        raise Missing(f"needs about {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
    try:
        peer = peer_type(result.capacity, ROW_SHAPE, result.batch, result.devices, path)
    except ImportError as error:
        raise Missing(f"cannot be imported: {error}") from error
    peer.fill()
    return peer


def _measure(peer: Peer, batches: list[Any], seconds: float, at_least: int = 1) -> list[float]:
    """Step times in milliseconds over about `seconds`."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < at_least or time.perf_counter() < end:
        start = time.perf_counter()
        peer.step(batches[len(times) % len(batches)])
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _serve(peer: Peer, batches: list[Any], result: Result, out: TextIO) -> None:
    """Answers each line of stdin, a number of seconds, with a JSON list of step times; the caller interleaves peers."""
    print(result.line(), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(_measure(peer, batches, float(line))), file=out, flush=True)


def main(*peer_types: type[Peer]) -> None:
    """Command line of an adapter: measures one peer and prints its `Result` as one line of JSON.

    With `--serve` it prints the line without times as soon as the buffer is full, then measures when told to.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=[p.name for p in peer_types], default=peer_types[0].name)
    parser.add_argument("--capacity", type=int, default=1024, help="rows a device")
    parser.add_argument("--batch", type=int, default=64, help="rows in and rows out, a device and step")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--path", help="checkout of the peer, if it is not an installed package")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to measure")
    parser.add_argument("--serve", action="store_true", help="measure when stdin says so")
    args = parser.parse_args()

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints while it is imported goes to stderr: stdout is JSON only
    if args.devices > 1:
        # Before jax is imported: with fewer threads than fake devices collectives can starve. One device keeps the
        # default, because more threads than cores make its small steps slower.
        os.environ.setdefault("NPROC", str(max(2 * args.devices, os.cpu_count() or 1)))

    (peer_type,) = [p for p in peer_types if p.name == args.peer]
    expected = args.capacity * args.devices * (math.prod(ROW_SHAPE) + LABEL_BYTES)
    result = Result(args.peer, args.capacity, args.devices, args.batch, bytes_expected=expected, note=peer_type.note)
    try:
        peer = _build(peer_type, result, args.path)
    except Missing as reason:
        result.missing = str(reason)
        print(result.line(), file=out, flush=True)
        return
    batches = [peer.place(random_rows(args.batch * args.devices, ROW_SHAPE, seed)) for seed in range(8)]
    _measure(peer, batches, seconds=0.5, at_least=2)  # compiles and warms up
    result.version, result.device = peer.version, peer.device
    result.bytes, result.temp_bytes = peer.bytes(), peer.temp_bytes()
    if args.serve:
        _serve(peer, batches, result, out)
    else:
        result.insert_draw_ms = summary(_measure(peer, batches, args.seconds, at_least=3))
        print(result.line(), file=out, flush=True)
