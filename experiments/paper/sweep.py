"""Figure 2: accuracy with rehearsal against the size of the buffer, and against r and c.

One of them changes at a time; the others are the config's. Top-5 accuracy after the last task, mean over tasks, beside that of
the same model from scratch and incrementally: those runs are figure 1's.
"""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.pages.page import Json, table
from experiments.paper.accuracy import last, mean, summary
from experiments.paper.draw import panels
from experiments.paper.study import STRATEGIES, Study
from jaxcl.report import color_of

TITLE = "2. Accuracy against the size of the memory, r and c"
LABELS = {
    "buffer.share": "memory, share of training rows",
    "buffer.representatives": "r, representatives a step",
    "buffer.candidates": "c, candidates a step",
}


def settings(study: Study) -> dict[str, tuple[float, ...]]:
    b, figures = study.config.buffer, study.figures
    return {
        "buffer.share": figures.shares,
        "buffer.representatives": figures.representatives or tuple(k * b.representatives for k in (1, 2, 4, 8)),
        "buffer.candidates": figures.candidates or (b.candidates // 2, b.candidates, 2 * b.candidates),
    }


def measure(study: Study) -> Json:
    c = study.config
    swept = {
        field: [{"value": x, **summary(study.runs(study.model, "er", {field: x}))} for x in values]
        for field, values in settings(study).items()
    }
    return {
        "name": c.name,
        "model": study.model,
        "seeds": study.grid.seeds,
        "batch_size": c.batch_size,
        "own": {"buffer.representatives": c.buffer.representatives, "buffer.candidates": c.buffer.candidates}
        | ({} if c.buffer.share is None else {"buffer.share": c.buffer.share}),
        "bounds": {name: summary(study.runs(study.model, name)) for name in ("from_scratch", "incremental")},
        "swept": swept,
    }


def shown(field: str, value: float) -> str:
    return f"{100 * value:g} %" if field == "buffer.share" else f"{value:g}"


def picture(found: Json) -> Figure:
    figure, (row,) = panels(3, width=3.2)
    for axes, (field, points) in zip(row, found["swept"].items(), strict=True):
        for strategy, x in found["bounds"].items():
            level = float(100 * np.mean(last(x["top5_so_far"])))
            axes.axhline(level, color=color_of(strategy), ls="--", label=STRATEGIES[strategy])
        values = [point["value"] for point in points]
        top5 = [100 * np.mean(last(point["top5_so_far"])) for point in points]
        axes.plot(values, top5, color=color_of("er"), marker="o", ms=4, label="rehearsal")
        axes.set_xscale("log")
        axes.set_xticks(values, [shown(field, x) for x in values])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 102)
        axes.set_xlabel(LABELS[field])
    row[0].set_ylabel("top-5, %, after the last task")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def markdown(found: Json) -> str:
    scratch = np.mean(last(found["bounds"]["from_scratch"]["top5_so_far"]))
    own = ", ".join(f"{LABELS[name].split(',')[0]} {shown(name, value)}" for name, value in found["own"].items())
    rows = [
        (
            LABELS[field],
            shown(field, p["value"]),
            f"{p['capacity']:,}",
            mean(last(p["top5_so_far"])),
            f"{100 * np.mean(last(p['top5_so_far'])) / scratch:.1f} %",
            mean(last(p["top1_so_far"])),
        )
        for field, points in found["swept"].items()
        for p in points
    ]
    head = ("changed", "to", "rows of memory", "top-5, %", "of from scratch", "top-1, %")
    return (
        f"{found['name']}, {found['model']}, {found['seeds']} seed(s); {found['batch_size']} new rows a step; the config's own"
        f" values: {own}.\n\n{table(head, rows)}"
    )
