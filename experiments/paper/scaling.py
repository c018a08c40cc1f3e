"""Figure 3: run time against the number of devices, measured on those of this machine and modelled up to 1,024.

Steps of a plain and of a rehearsing run are measured in turn, at the paper's b new and r drawn rows a device, on 1, 2, 4, ...
devices. Training from scratch takes plain steps, (tasks + 1) / 2 times as many. All is given as seconds for a million new rows.

The model is that of `experiments/paper/step_model.py`. Its costs of a row, a byte and a message are fitted to all device
counts but one, and the one left out is predicted. Fake CPU devices share the cores of one machine, so what N of them do adds
up: there the loads are N times those of a device, and the shape says nothing of a cluster. For 1,024 devices the rate of the
one device measured is joined with a stated network.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.bench.harness import Contender, in_turn, spread
from experiments.pages.page import Json, table
from experiments.paper.draw import panels
from experiments.paper.step_model import DEVICES, Load, Machine, all_reduce, exchange, fit, run_time
from experiments.paper.study import STRATEGIES, Study, begun
from jaxcl.report import color_of

TITLE = "3. Run time against the number of devices"
RUNS, STEPS = 15, 2  # of each kind and number of devices
WARM_UP = 6  # steps that fill the memory beyond what a draw wants
MILLION = 10**6
KINDS = ("incremental", "er")
KIND_OF = {"from_scratch": "incremental", "incremental": "incremental", "er": "er"}
SHOWN = (1, 16, 128, 1024)  # devices modelled that the page shows


def measure(study: Study) -> Json:
    figures = study.figures
    counts = [n for n in DEVICES if n <= len(study.devices)]
    shared = study.devices[0].platform == "cpu"
    measured: list[Json] = []
    facts: Json = {}
    for n in counts:
        one, facts = steps_on(study, n)
        measured.append({"devices": n, "step_ms": one})
    sizes = {"new": figures.new, "representatives": figures.drawn, **facts}
    rate = figures.new / (1e-3 * measured[0]["step_ms"]["incremental"]["median"])
    machine = Machine(rate)
    return {
        "name": study.config.name,
        "model": study.model,
        "sizes": sizes,
        "devices_share_cores": shared,
        "measured": measured,
        "checked": check(measured, sizes, shared),
        "model_of": dataclasses.asdict(machine),
        "modelled": [{"devices": n, **run_time(machine, n, **sizes, rows=MILLION, epochs=1)} for n in DEVICES],
    }


def steps_on(study: Study, devices: int) -> tuple[Json, Json]:
    """Steps of both kinds in milliseconds, in turn; and what the model is told of them."""
    figures, some = study.figures, study.devices[:devices]
    fields = {
        "batch_size": figures.new * devices,
        "buffer.representatives": figures.drawn * devices,
        "buffer.candidates": max(1, figures.new * devices // 4),
        "buffer.tier": "device",
        **figures.short,
    }
    contenders = {}
    for kind in KINDS:
        run, state, batch = begun(study.configured(study.model, kind, fields), some)
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        contenders[kind] = Contender(run.train_step.program.lower(state, batch).compile(), state, batch)
        contenders[kind].run(WARM_UP)
    in_turn(list(contenders.values()), RUNS, STEPS)
    assert run.buffer is not None
    facts = {"parameters": parameters, "row_bytes": run.buffer.traffic["row_bytes"], "tasks": len(run.scenario.tasks)}
    return {kind: spread(one.seconds) for kind, one in contenders.items()}, facts


def step_load(kind: str, devices: int, sizes: Json, shared: bool) -> Load:
    """Of one device, or of all where they share the cores of one machine; nothing is taken as hidden."""
    parts = [Load(rows=sizes["new"]), all_reduce(devices, sizes["parameters"])]
    if kind == "er":
        r = sizes["representatives"]
        parts += [Load(rows=r), exchange(devices, r, sizes["row_bytes"])]
    total = np.sum(parts, axis=0) * (devices if shared else 1)
    return Load(*map(float, total))


def check(measured: list[Json], sizes: Json, shared: bool) -> list[Json]:
    """Each number of devices predicted from all the others; none with fewer than three."""
    steps = [(x["devices"], kind, x["step_ms"][kind]["median"]) for x in measured for kind in KINDS]
    loads = {(n, kind): step_load(kind, n, sizes, shared) for n, kind, _ in steps}
    found: list[Json] = []
    for n, kind, ms in steps if len(measured) > 2 else []:
        others = [step for step in steps if step[0] != n]
        costs = fit([loads[m, other] for m, other, _ in others], [ms for *_, ms in others])
        predicted = float(np.array(loads[n, kind]) @ costs)
        error = predicted / ms - 1
        found.append({"devices": n, "kind": kind, "measured_ms": ms, "predicted_ms": predicted, "error": error})
    return found


def seconds_a_million(found: Json, strategy: str, devices: int, ms: float) -> float:
    """Seconds to train on a million new rows once, at this many milliseconds a step."""
    times = (found["sizes"]["tasks"] + 1) / 2 if strategy == "from_scratch" else 1.0
    return times * 1e-3 * ms * MILLION / (found["sizes"]["new"] * devices)


def picture(found: Json) -> Figure:
    figure, ((left, right),) = panels(2, width=4.2, height=3.2)
    for strategy, label in STRATEGIES.items():
        kind = KIND_OF[strategy]
        style: Any = {"color": color_of(strategy), "ms": 4}
        for marker, points in (
            ("o-", [(x["devices"], x["step_ms"][kind]["median"]) for x in found["measured"]]),
            ("x", [(x["devices"], x["predicted_ms"]) for x in found["checked"] if x["kind"] == kind]),
        ):
            seconds = [seconds_a_million(found, strategy, n, ms) for n, ms in points]
            left.plot([n for n, _ in points], seconds, marker, label=label if marker == "o-" else None, **style)
        name = "rehearsal" if strategy == "er" else strategy
        right.plot([x["devices"] for x in found["modelled"]], [x[name] for x in found["modelled"]], "o-", **style)
    left.set_title("measured; x: predicted from the others", loc="left", fontsize=9)
    right.set_title("model, stated network", loc="left", fontsize=9)
    left.set_ylabel("seconds a million new rows")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("devices")
    ticks = [x["devices"] for x in found["measured"]]
    left.set_xticks(ticks, [str(n) for n in ticks])
    right.set_xticks(DEVICES[::2], [str(n) for n in DEVICES[::2]])
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def markdown(found: Json) -> str:
    s, machine = found["sizes"], found["model_of"]
    worst = max((abs(x["error"]) for x in found["checked"]), default=None)
    labels = [f"{label}, s" for label in STRATEGIES.values()]
    modelled = [
        (
            x["devices"],
            *(f"{x[name]:,.2f}" for name in ("from_scratch", "incremental", "rehearsal")),
            f"{x['rehearsal'] / x['incremental']:.3f}",
        )
        for x in found["modelled"]
        if x["devices"] in SHOWN
    ]
    head = ("devices", "plain step, ms", "rehearsal step, ms", "ratio", *labels)
    return "\n\n".join(
        [
            f"{found['name']}, {found['model']} ({s['parameters']:,} parameters), b = {s['new']} and r = {s['representatives']}"
            " rows a device; seconds for a million new rows.",
            table((*head, "plain, predicted, ms", "rehearsal, predicted, ms"), measured_rows(found)),
            "Fewer than three numbers of devices are too few to check the step model."
            if worst is None
            else f"Largest error of a prediction: {100 * worst:.0f} %.",
            f"The model's machine: {machine['rows_per_second']:,.0f} rows/s, {machine['bandwidth'] / 1e9:g} GB/s and"
            f" {1e6 * machine['latency']:g} us.",
            table(("devices", *labels, "rehearsal over incremental"), modelled),
        ]
    )


def measured_rows(found: Json) -> Iterator[tuple[Any, ...]]:
    guess = {(x["devices"], x["kind"]): x for x in found["checked"]}
    for x in found["measured"]:
        n, ms = x["devices"], {kind: x["step_ms"][kind]["median"] for kind in KINDS}
        seconds = [seconds_a_million(found, strategy, n, ms[KIND_OF[strategy]]) for strategy in STRATEGIES]
        guessed = [guess.get((n, kind)) for kind in KINDS]
        yield (
            n,
            *(f"{y:.1f}" for y in ms.values()),
            f"{ms['er'] / ms['incremental']:.3f}",
            *(f"{y:,.0f}" for y in seconds),
            *(f"{g['predicted_ms']:.1f} ({100 * g['error']:+.0f} %)" if g else "-" for g in guessed),
        )
