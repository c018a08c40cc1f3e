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
from typing import Any, ClassVar, NamedTuple

import numpy as np

ROW_SHAPE = (32, 32, 3)
ROW_BYTES = math.prod(ROW_SHAPE) + 4  # with its label
CLASSES = 100
BASE_BYTES = 500_000_000  # a Python process with its frameworks

Images = tuple[np.ndarray, np.ndarray]  # uint8 [n, H, W, C], int32 [n]


class Missing(Exception):
    """This peer cannot run here; the message says why."""


class Sizes(NamedTuple):
    """Of a measurement: rows a device, rows in and rows out a device and step; and where the peer's checkout is, if needed."""

    capacity: int
    batch: int
    devices: int
    path: str | None


class Peer(abc.ABC):
    """One buffer under measurement; made of `Sizes`, which may raise `Missing` or ImportError where it cannot run.

    Attributes:
      name: as in the report.
      note: how what it does in a step differs from the others, for the report.
      peak: memory it needs at its worst, from the largest resident size seen, in units of `capacity * devices` rows as
        they arrive.
      one_device: it has no buffer over several.
      chunk: rows handed over at once while it is filled.
      steps: that a call of `step` takes, by which its time is divided.
      version: of its package, or commit, and of what it runs on.
      device: where it ran.
      temp_bytes: temporary memory of one compiled step; None where there is no compiler to ask.
    """

    name: ClassVar[str]
    note: ClassVar[str]
    peak: ClassVar[float]
    one_device: ClassVar[bool] = True
    steps: ClassVar[int] = 1
    version: str
    device: str = "host memory, CPU"
    temp_bytes: int | None = None
    chunk: int = 8192

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    @abc.abstractmethod
    def place(self, rows: Images) -> Any:
        """Rows in the peer's own array type, where the peer wants them."""

    @abc.abstractmethod
    def insert(self, rows: Any) -> None:
        """Inserts placed rows, of any number."""

    @abc.abstractmethod
    def step(self, batch: Any) -> None:
        """Inserts the placed batch and draws as many rows, `steps` times; returns when all is done."""

    @abc.abstractmethod
    def bytes(self) -> int:
        """Bytes of the stored rows, over all devices."""


@dataclasses.dataclass
class Result:
    """One line of the benchmark; the fields are the keys of its JSON. Those not named here are as in `Sizes` and `Peer`.

    Attributes:
      insert_draw_ms: median, p10, p90 and n of the step times in milliseconds; None if missing.
      bytes: what the buffer occupies over all devices.
      bytes_expected: capacity * devices * (row + label).
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


def random_rows(count: int, seed: int) -> Images:
    """`count` seeded random rows and labels."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (count, *ROW_SHAPE), np.uint8)
    return rows, rng.integers(0, CLASSES, count).astype(np.int32)


def fill(peer: Peer) -> None:
    """Fills its buffer to capacity, in equal chunks of at most `peer.chunk` rows (one jit trace)."""
    count = peer.sizes.capacity * peer.sizes.devices
    pieces = next(k for k in range(math.ceil(count / peer.chunk), count + 1) if count % k == 0)
    for i in range(pieces):
        peer.insert(peer.place(random_rows(count // pieces, seed=1000 + i)))


def free_bytes() -> int | None:
    """Main memory that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo") as f:
            lines = dict(line.split(":") for line in f)
    except OSError:
        return None
    return int(lines["MemAvailable"].split()[0]) * 1024


def build(peer_type: type[Peer], sizes: Sizes) -> Peer:
    """The peer with a full buffer, compiled and warm.

    Raises:
      Missing: it cannot run here.
    """
    need = BASE_BYTES + int(peer_type.peak * sizes.capacity * sizes.devices * ROW_BYTES)
    free = free_bytes()
    if free is not None and need > free:
        raise Missing(f"needs about {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
    if peer_type.one_device and sizes.devices > 1:
        raise Missing(f"{peer_type.name} has no buffer over several devices")
    try:
        peer = peer_type(sizes)
    except ImportError as error:
        raise Missing(f"cannot be imported: {error}") from error
    fill(peer)
    return peer


def turn(peer: Peer, batches: list[Any], seconds: float) -> list[float]:
    """Step times in milliseconds over about `seconds`, of two steps at least."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        peer.step(batches[len(times) % len(batches)])
        times.append(1e3 * (time.perf_counter() - start) / peer.steps)
    return times


def main(*peer_types: type[Peer]) -> None:
    """Command line of an adapter: one peer, which measures when told to, so that the caller can let peers take turns.

    Prints its `Result` as a line of JSON as soon as the buffer is full; then answers each line of stdin, a number of seconds,
    with a JSON list of step times.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=[p.name for p in peer_types], default=peer_types[0].name)
    parser.add_argument("--capacity", type=int, default=1024, help="rows a device")
    parser.add_argument("--batch", type=int, default=64, help="rows in and rows out, a device and step")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--path", help="checkout of the peer, if it is not an installed package")
    args = parser.parse_args()

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints while it is imported goes to stderr: stdout is JSON only
    if args.devices > 1:
        # Before jax is imported: with fewer threads than fake devices collectives can starve. One device keeps the
        # default, because more threads than cores make its small steps slower.
        os.environ.setdefault("NPROC", str(max(2 * args.devices, os.cpu_count() or 1)))

    (peer_type,) = [p for p in peer_types if p.name == args.peer]
    sizes = Sizes(args.capacity, args.batch, args.devices, args.path)
    result = Result(args.peer, args.capacity, args.devices, args.batch, note=peer_type.note)
    result.bytes_expected = args.capacity * args.devices * ROW_BYTES
    try:
        peer = build(peer_type, sizes)
    except Missing as reason:
        result.missing = str(reason)
        print(json.dumps(dataclasses.asdict(result)), file=out, flush=True)
        return
    batches = [peer.place(random_rows(args.batch * args.devices, seed)) for seed in range(8)]
    turn(peer, batches, seconds=0.5)  # compiles and warms up
    result.version, result.device = peer.version, peer.device
    result.bytes, result.temp_bytes = peer.bytes(), peer.temp_bytes
    print(json.dumps(dataclasses.asdict(result)), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(peer, batches, float(line))), file=out, flush=True)
