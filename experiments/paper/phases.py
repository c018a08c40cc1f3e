"""Figure 4: an iteration by phase, with the buffer on the device and in host memory, and what of its work is hidden.

Short runs of the training loop itself, over all tasks; a phase's time is divided by the steps. Four kinds: a plain step on b
rows, a plain step on b + r rows, and rehearsal in either tier. On the device, insert, draw and exchange are part of the
compiled step: what of them shows is by how much that is longer than the plain step on as many rows. In host memory they are a
thread's work beside the loop (copy, sample, exchange, populate): what of it shows is by how much the step is longer than with
the memory on the device.
"""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.pages.page import Json, table
from experiments.paper.draw import panels
from experiments.paper.study import Study
from experiments.studies.grid import Fields
from jaxcl.report.pictures import BACKGROUND, STEP
from jaxcl.runs.steps import STEPPING

TITLE = "4. An iteration by phase"
REPEATS = 3  # runs of each kind, in turn; with seeds of their own
COLORS = STEP | BACKGROUND


def kinds(study: Study) -> dict[str, tuple[str, Fields]]:
    b, r = study.config.batch_size, study.config.buffer.representatives
    return {
        "plain, b rows": ("incremental", {}),
        "plain, b + r rows": ("incremental", {"batch_size": b + r}),
        "rehearsal, device": ("er", {"buffer.tier": "device"}),
        "rehearsal, host": ("er", {"buffer.tier": "host"}),
    }


def measure(study: Study) -> Json:
    found: dict[str, list[Json]] = {kind: [] for kind in kinds(study)}
    for seed in range(study.config.seed, study.config.seed + REPEATS):
        for kind, (strategy, fields) in kinds(study).items():
            changes = study.fields(study.model, strategy, {**study.figures.short, **fields, "seed": seed})
            found[kind] += study.grid.runs(f"timed/{kind.replace(' ', '_')}", changes, seeds=1)
    return {
        "name": study.config.name,
        "model": study.model,
        "sizes": {"b": study.config.batch_size, "r": study.config.buffer.representatives},
        "kinds": {kind: per_step(runs) for kind, runs in found.items()},
        "repeats": REPEATS,
    }


def per_step(runs: list[Json]) -> Json:
    """Milliseconds of a step in each phase, medians over the runs."""

    def median(seconds: str, name: str) -> float:
        return float(np.median([1e3 * run.get(seconds, {}).get(name, 0.0) / run["steps"] for run in runs]))

    loop = {name: median("seconds_by_phase", name) for name in STEPPING}
    background = {name: median("background_seconds", name) for name in BACKGROUND if "background_seconds" in runs[0]}
    whole = [1e3 * sum(run["seconds_by_phase"].get(name, 0.0) for name in STEPPING) / run["steps"] for run in runs]
    return {"loop": loop, "background": background, "step": whole, "steps": runs[0]["steps"]}


def picture(found: Json) -> Figure:
    figure, ((axes,),) = panels(1, width=7.5, height=3.2)
    axes.grid(False)
    bars = [(kind, "", x["loop"]) for kind, x in found["kinds"].items()]
    bars += [(f"{kind}: beside it", "///", x["background"]) for kind, x in found["kinds"].items() if x["background"]]
    for y, (_, hatch, parts) in enumerate(bars):
        left = 0.0
        for name, ms in parts.items():
            axes.barh(y, ms, 0.6, left, color=COLORS[name], hatch=hatch, edgecolor="white", lw=0.5)
            left += ms
        axes.annotate(f"{left:.3g} ms", (left, y), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)), [kind for kind, _, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    axes.set_xlim(0, 1.15 * max(sum(parts.values()) for _, _, parts in bars))
    used = [name for name in COLORS if any(parts.get(name) for _, _, parts in bars)]
    handles = [Patch(color=COLORS[name], label=name) for name in used]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(used), 4))
    return figure


def markdown(found: Json) -> str:
    s, kinds = found["sizes"], found["kinds"]
    step = {kind: float(np.median(x["step"])) for kind, x in kinds.items()}
    work = sum(ms for name, ms in kinds["rehearsal, host"]["background"].items() if name != "copy")
    rows = [(name, *(f"{x['loop'][name]:.2f}" for x in kinds.values())) for name in STEPPING]
    rows.append(("**the loop**", *(f"**{ms:.2f}**" for ms in step.values())))
    for name in BACKGROUND:
        rows.append((f"{name} (beside it)", *(f"{x['background'].get(name, 0):.2f}" for x in kinds.values())))
    over = (("rehearsal, device", "plain, b + r rows"), ("rehearsal, host", "rehearsal, device"))
    compared = [
        (f"{one} over {other}", f"{step[one] - step[other]:+.2f}", f"{step[one] / step[other]:.2f}")
        for one, other in over
    ]
    compared.append(("work of the thread beside the loop, but for copying", f"{work:.2f}", ""))
    return "\n\n".join(
        [
            f"{found['name']}, {found['model']}, b = {s['b']}, r = {s['r']} over all devices; milliseconds a step, medians of"
            f" {found['repeats']} runs in turn.",
            table(("phase", *kinds), rows),
            table(("a step", "ms", "times"), compared),
        ]
    )
