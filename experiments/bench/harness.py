"""What the benchmarks share: options from a signature, timing in turn, and a record that says where it was measured.

A benchmark is one function that returns a JSON record. `run` makes its keyword parameters the flags of the command and adds
the environment to what it returns.
"""

import dataclasses
import importlib.metadata
import inspect
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments.pages.page import ROOT, Json, as_json
from jaxcl import cli
from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows
from jaxcl.check import POSITIVE, check, refused
from jaxcl.types import Batch

CLASSES, SHAPE = 100, (32, 32, 3)  # of the rows that are made up
_DEFINE: dict[Any, Callable[..., Any]] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}


def run(measure: Callable[..., Json], plot: Callable[[Json], Figure] | None = None) -> None:
    """The command of a benchmark: `measure` with its parameters as flags; its record goes to --json, or is printed.

    A parameter is annotated `Annotated[type, "what it is"]`; the type is a number, a string, a bool, a Literal, or a tuple of
    one of them, and None as its default leaves it out. Numbers must be positive.

    Args:
      plot: draws the picture beside the file.
    """
    hints = typing.get_type_hints(measure, include_extras=True)
    defaults = {p.name: p.default for p in inspect.signature(measure).parameters.values()}
    types = {name: typing.get_args(hints[name]) for name in defaults}
    for name, (kind, text) in types.items():
        _define(name, kind, text, defaults[name])

    def main() -> None:
        options = {name: _value(name, kind) for name, (kind, _) in types.items()}
        record = {**measure(**options), **environment()}
        if jax.process_index() == 0:
            _publish(record, plot)

    cli.run(main)


def _define(name: str, kind: Any, text: str, default: Any) -> None:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        flags.DEFINE_enum(name, default, inner, text)
    elif origin is tuple:
        flags.DEFINE_list(name, [str(x) for x in default], text)
    else:
        _DEFINE[inner[0] if inner else kind](name, default, text)
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # for --help


def _value(name: str, kind: Any) -> Any:
    """What was given for an option.

    Raises:
      UserError: an item of another type, or a number that is not positive.
    """
    value: Any = flags.FLAGS[name].value
    if typing.get_origin(kind) is tuple:
        make = typing.get_args(kind)[0]
        try:
            value = [make(x) for x in value]
        except ValueError:
            raise refused(f"--{name}", ",".join(value), f"a list of {make.__name__}") from None
    for x in value if isinstance(value, list) else [value]:
        if isinstance(x, int | float) and not isinstance(x, bool):
            check(f"--{name}", x, POSITIVE)
    return value


def _publish(record: Json, plot: Callable[[Json], Figure] | None) -> None:
    if cli.JSON.value is None:
        print(as_json(record), end="")
        return
    path = pathlib.Path(cli.JSON.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(record))
    if plot is not None:
        plot(record).savefig(path.with_suffix(".png"), dpi=150)


def show(record: Json) -> None:
    """Prints what was found so far on one line, its numbers with four digits."""
    text = json.dumps(record)
    print(json.dumps(json.loads(text, parse_float=lambda x: float(f"{float(x):.4g}"))), flush=True)


def environment(packages: tuple[str, ...] = ("jax", "jaxlib", "flax", "optax", "numpy")) -> Json:
    """Where a figure was measured: versions, devices and machine of this process, the revision, and the command."""
    device = jax.devices()[0]
    revision = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "devices": {"count": jax.device_count(), "kind": device.device_kind, "platform": device.platform},
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
        "revision": revision.stdout.strip() or "unknown",
        "command": " ".join(["python -m", _module(), *(shlex.quote(_without_place(x)) for x in sys.argv[1:])]),
    }


def _without_place(argument: str) -> str:
    """`--workdir=/somewhere/x` -> `--workdir=WORKDIR`: where files lay says nothing about the figures."""
    return re.sub(
        r"^--(?:\w+\.)*(\w+)=(\w+:)?[/~].*", lambda m: f"{m[0].partition('=')[0]}={m[2] or ''}{m[1].upper()}", argument
    )


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else sys.argv[0]


@dataclasses.dataclass
class Contender:
    """A step `(state, batch) -> (state, anything)` under measurement.

    Attributes:
      blocking: every step is waited for; else only the last one of a turn.
      seconds: of a step, one for every turn of `in_turn`.
    """

    step: Any
    state: Any
    batch: Any = None
    blocking: bool = False
    seconds: list[float] = dataclasses.field(default_factory=list)

    def run(self, steps: int) -> float:
        """Seconds a step, over `steps` of them."""
        begin = time.perf_counter()
        for _ in range(steps):
            self.state, _ = self.step(self.state, self.batch)
            if self.blocking:
                jax.block_until_ready(self.state)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - begin) / steps

    def turns(self, runs: int, steps: int = 1) -> dict[str, float]:
        """Adds `runs` turns of `steps` steps: the spread of all."""
        self.seconds += [self.run(steps) for _ in range(runs)]
        return spread(self.seconds)


def in_turn(contenders: Sequence[Contender], runs: int, steps: int) -> None:
    """Adds `runs` turns of `steps` steps each to every contender, so that what else the machine does hits all alike; who
    begins, and in which direction the turn goes, changes from run to run."""
    n = len(contenders)
    for i in range(runs):
        for j in range(n):
            one = contenders[(i + (j if i // n % 2 else -j)) % n]
            one.seconds.append(one.run(steps))


def summary(values: Any) -> dict[str, float]:
    """Median, p10 and p90, and of how many values."""
    p10, median, p90 = map(float, np.quantile(values, [0.1, 0.5, 0.9]))
    return {"median": median, "p10": p10, "p90": p90, "n": len(values)}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """`summary` in milliseconds."""
    return summary(1e3 * np.array(seconds))


def ratio(one: Contender, other: Contender) -> dict[str, float]:
    """`summary` of the ratio of their seconds, taken turn by turn."""
    return summary(np.array(one.seconds) / np.array(other.seconds))


def made_up(mesh: jax.sharding.Mesh, rows: int, shape: Sequence[int] = SHAPE, classes: int = CLASSES) -> Batch:
    """A batch of `rows` random images over all processes, with about as many of each class, split over the mesh."""
    rng, rows = np.random.default_rng(0), rows // jax.process_count()
    batch = {
        "image": rng.integers(0, 256, (rows, *shape), np.uint8),
        "label": rng.permutation(np.arange(rows, dtype=np.int32) % classes),
        "id": np.arange(rows, dtype=np.int32),
        "valid": np.ones(rows, bool),
    }
    return mesh_lib.shard_rows(mesh, batch)


def made_up_rows(mesh: jax.sharding.Mesh, rows: int) -> Rows:
    """The same as candidates of a buffer."""
    batch = made_up(mesh, rows)
    return Rows({"image": batch["image"]}, batch["label"], batch["id"], batch["valid"])


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
