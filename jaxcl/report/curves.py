"""The training loss, from the logs of the runs."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jaxcl.report.pictures import panels_of
from jaxcl.report.runs import Group
from jaxcl.report.style import color_of

MOST = 300  # points of a line


def read_loss(folder: Path) -> np.ndarray:
    """`[n, 3]`: step, task and loss of every line that tells them; n = 0 without a log."""
    try:
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return np.zeros((0, 3))
    found = []
    for line in lines:
        try:
            value = json.loads(line)
            if value["kind"] == "train" and np.isfinite(value["loss"]):
                found.append((value["step"], value["task"], value["loss"]))
        except (ValueError, KeyError, TypeError):
            continue  # torn, or of something else
    return np.asarray(found, np.float64).reshape(-1, 3)


def thinned(rows: np.ndarray) -> np.ndarray:
    """At most `MOST` rows, each the mean of neighbours."""
    if len(rows) <= MOST:
        return rows
    return np.stack([part.mean(0) for part in np.array_split(rows, MOST)])


def loss(groups: Sequence[Group]) -> Figure | None:
    """The loss by step, a line a seed; a panel a group. None where no log tells it."""
    found = [[read_loss(path) for path in group.paths] for group in groups]
    values = np.concatenate([rows[:, 2] for logs in found for rows in logs] or [np.zeros(0)])
    if not len(values):
        return None
    figure, panels = panels_of(groups, 3.3, 2.8, "loss")
    highest = 1.15 * float(np.quantile(values, 0.99)) or 1.0  # a spike does not flatten the rest
    for axes, group, logs in zip(panels, groups, found, strict=True):
        for rows in logs:
            step, _, y = thinned(rows).T
            axes.plot(step, y, color=color_of(group.strategy), lw=1.2, alpha=0.9 if len(logs) == 1 else 0.5)
        for rows in logs[:1]:
            begins = rows[1:][np.diff(rows[:, 1]) != 0, 0]
            if len(begins) < 30:
                axes.vlines(begins, 0, highest, color="#8a939c", lw=0.8, ls=":")
        axes.set_ylim(0, highest)
        axes.set_xlim(left=0)
        axes.set_xlabel("steps")
        axes.grid(axis="y")
    return figure
