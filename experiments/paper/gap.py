"""What is missing to training from scratch, as the README and docs/paper.md show it: of `experiments.studies.rehearsal`."""

import numpy as np
from matplotlib.figure import Figure

from experiments.pages.page import Json, table
from experiments.paper.draw import panels
from experiments.studies import rehearsal
from jaxcl.report import spread

TITLE = "Rehearsal beside training from scratch"
FRONT = {
    "from_scratch": "from scratch at every task",
    "incremental": "incremental",
    "er": "rehearsal, plain loss",
    "er+balanced": "rehearsal",
    "er+balanced 2x steps": "rehearsal, twice the steps",
    "er+balanced r=b": "rehearsal, r = b",
}  # row -> what the README calls it


def front(found: Json) -> str:
    """For the README: the rows of `FRONT`, as far as they were measured."""
    s, rows = found["sizes"], {one["row"]: one for one in found["rows"]}
    scratch, b = rows["from_scratch"], s["batch_size"]

    def replayed(one: Json) -> str:
        of_memory = one["fields"]["strategy"] == "er"
        return f"{b} + {one['fields'].get('buffer.representatives', s['representatives'])}" if of_memory else f"{b}"

    cells = [
        (
            *(label, replayed(rows[name]), len(rows[name]["top5"])),
            *(spread(rows[name][key], digits=1) for key in ("top5", "top1")),
            *(f"{100 * np.mean(rows[name][key]) / np.mean(scratch[key]):.0f} %" for key in ("top5", "top1")),
        )
        for name, label in FRONT.items()
        if name in rows
    ]
    head = (
        *("", "new + replayed rows a step", "seeds", "top-5, %", "top-1, %"),
        *("top-5 over from scratch", "top-1 over from scratch"),
    )
    devices, cores, jax = found["devices"], found["machine"]["cores"], found["versions"]["jax"]
    where = f"{devices['count']} {devices['kind']} device of {cores} cores; jax {jax}"
    return f"{table(head, cells)}\n\n{found['name']}; a memory of {rehearsal.memory_of(s)}; {where}."


def picture(found: Json) -> Figure:
    """Top-5 and top-1 after each task, averaged over the tasks so far; mean and range of the seeds."""
    rows = {one["row"]: one for one in found["rows"]}
    figure, [panes] = panels(2, 1, width=3.9, height=2.9)
    for axes, (key, title) in zip(panes, (("top5_so_far", "top-5"), ("top1_so_far", "top-1")), strict=True):
        for name, label in FRONT.items():
            if name in rows:
                values = 100 * np.array(rows[name][key])
                tasks = range(1, values.shape[1] + 1)
                (line,) = axes.plot(tasks, values.mean(0), "--" if name == "er" else "-", marker="o", ms=4, label=label)
                axes.fill_between(tasks, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_ylim(0, None)
        axes.set_xticks(tasks)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("tasks trained")
    panes[0].set_ylabel("%, mean of tasks so far")
    figure.legend(*panes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
