"""Figure 3 of docs/paper.md: a model of the run time of the three approaches on 1 to 1,024 devices.

    python -m experiments.paper.step_model --rows_per_second=1500 --parameters=25557032 --row_bytes=150528 \
        --json=runs/step_model.json

The step of N devices, each with b new rows and r representatives:

    compute     rows / rows_per_second, of one device
    all-reduce  2 (N - 1) / N * 4 bytes * parameters / bandwidth + 2 ceil(log2 N) * latency     (ring, float32 gradients)
    exchange    rows moved * row_bytes / bandwidth + hops * latency     (what `jaxcl.buffer` moves, padding included)

Incremental training takes compute(b) + all-reduce. Rehearsal takes compute(b + r) + all-reduce, with the exchange hidden behind
it, so the longer of the two ("hidden"), or their sum ("exposed"). Nothing else in the step is counted: rows per second, which
must be measured, holds the loading, the optimiser and the insert. A run is `tasks` equal tasks. From scratch trains on all rows
so far, so its steps are (tasks + 1) / 2 times as many. The defaults are the paper's sizes for ResNet-50 and 25 GB/s and 10 us,
a network of 200 Gbit/s a device; rows_per_second has no default. `experiments.paper` fits the model to measured steps.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from scipy.optimize import nnls

from experiments.pages.page import Json
from experiments.studies import grid
from jaxcl import cli
from jaxcl.buffer.exchange.mix import compact_hops
from jaxcl.check import POSITIVE, check

RATE = flags.DEFINE_float(
    "rows_per_second", None, "rows a second of forward and backward pass on one device; measure it"
)
PARAMETERS = flags.DEFINE_integer("parameters", 25_557_032, "of the model")
ROW_BYTES = flags.DEFINE_integer("row_bytes", 224 * 224 * 3 + 8, "of a stored record, label and id included")
BANDWIDTH = flags.DEFINE_float("bandwidth", 25e9, "bytes a second out of one device")
LATENCY = flags.DEFINE_float("latency", 1e-5, "seconds of one message")

DEVICES = tuple(2**k for k in range(11))
COLORS = {"from_scratch": "#009E73", "incremental": "#D55E00", "rehearsal": "#0072B2", "rehearsal_exposed": "#56B4E9"}
PARTS = {"compute": "#0072B2", "all_reduce": "#E69F00", "exchange": "#CC79A7"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a step runs on; all positive.

    Attributes:
      rows_per_second: of one device.
      bandwidth: bytes a second out of one device.
      latency: seconds of one message.
    """

    rows_per_second: float
    bandwidth: float = 25e9
    latency: float = 1e-5

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            check(name, value, POSITIVE)


class Load(NamedTuple):
    """What one device does in a part of a step: rows of forward and backward pass, bytes sent, messages waited for."""

    rows: float = 0.0
    bytes: float = 0.0
    messages: float = 0.0

    def seconds(self, machine: Machine) -> float:
        return self.rows / machine.rows_per_second + self.bytes / machine.bandwidth + self.messages * machine.latency


def all_reduce(devices: int, parameters: int) -> Load:
    """To sum float32 gradients over the devices."""
    return Load(bytes=2 * (devices - 1) / devices * 4 * parameters, messages=2 * math.ceil(math.log2(devices)))


def exchange(devices: int, representatives: int, row_bytes: int) -> Load:
    """To hand r representatives to each device by `mix`."""
    if devices == 1:
        return Load()
    hops = compact_hops(representatives, devices)
    return Load(bytes=hops.rows_moved * row_bytes, messages=1 if hops.along == 1 else 2)


def run_time(
    machine: Machine,
    devices: int,
    *,
    parameters: int,
    row_bytes: int,
    new: int = 56,
    representatives: int = 7,
    rows: int = 1_281_167,
    tasks: int = 4,
    epochs: int = 30,
) -> dict[str, float]:
    """Seconds of each approach, and the parts of a step of rehearsal in seconds."""
    reduce = all_reduce(devices, parameters).seconds(machine)
    move = exchange(devices, representatives, row_bytes).seconds(machine)
    plain, augmented = (Load(rows=x).seconds(machine) for x in (new, new + representatives))
    steps = epochs * rows / (new * devices)
    return {
        "incremental": steps * (plain + reduce),
        "rehearsal": steps * max(augmented + reduce, move),
        "rehearsal_exposed": steps * (augmented + reduce + move),
        "from_scratch": (tasks + 1) / 2 * steps * (plain + reduce),
        "step_compute": augmented,
        "step_all_reduce": reduce,
        "step_exchange": move,
    }


def fit(loads: Sequence[Load], seconds: Sequence[float]) -> np.ndarray:
    """Seconds of a row, of a byte and of a message that explain measured steps best, none of them negative.

    Relative errors count, so that short steps weigh as much as long ones (scipy's non-negative least squares).
    """
    measured = np.asarray(seconds)
    return nnls(np.array(loads) / measured[:, None], np.ones(len(measured)))[0]


def picture(found: Json) -> Figure:
    """Hours of a run against the number of devices; the parts of a step of rehearsal."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    devices, times = list(found["devices"]), list(found["devices"].values())
    panels = (
        ("hours (model)", COLORS, {name: [x[name] / 3600 for x in times] for name in COLORS}),
        ("ms of a step (model)", PARTS, {name: [1e3 * x[f"step_{name}"] or math.nan for x in times] for name in PARTS}),
    )
    for axes, (label, colors, lines) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, color in colors.items():
            axes.loglog(devices, lines[name], color=color, marker="o", ms=4, label=name)
        axes.set(xlabel="devices", ylabel=label)
        axes.grid(color="#e4e8ec")
        axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    machine = Machine(cli.required(RATE), BANDWIDTH.value, LATENCY.value)
    sizes: Any = {"parameters": PARAMETERS.value, "row_bytes": ROW_BYTES.value}
    found = {n: run_time(machine, n, **sizes) for n in DEVICES}
    for n, x in found.items():
        ratio, exposed = x["rehearsal"] / x["incremental"], x["rehearsal_exposed"] / x["incremental"]
        print(
            f"{n:5d} devices  incremental {x['incremental'] / 3600:8.2f} h  rehearsal {ratio:.3f} times that "
            f"({exposed:.3f} if nothing is hidden)  from scratch {x['from_scratch'] / x['incremental']:.2f} times"
        )
    if cli.JSON.value:
        stated = {"kind": "model, not measured", "machine": dataclasses.asdict(machine), "sizes": sizes}
        grid.write(cli.JSON.value, stated | {"devices": found}, picture)


if __name__ == "__main__":
    cli.run(main)
