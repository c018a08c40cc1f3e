"""Pictures of single classes, after the last task."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxcl.report.pictures import panels_of
from jaxcl.report.runs import Group, names_of
from jaxcl.report.style import BLUES, color_of

NAMED = 30  # classes, as many as can be named on an axis
_MARKERS = "osD^vP*X"  # of groups, since variants of one strategy share its colour


def in_order(group: Group) -> list[int]:
    """The classes in the order in which they came; those that came with every task as they are numbered."""
    return list(dict.fromkeys(label for task in group.results[0]["tasks"] for label in task))


def per_class_accuracy(groups: Sequence[Group]) -> Figure | None:
    """The accuracy on each class, mean over seeds, all groups together. None where they do not tell it of the same classes."""
    told = [group for group in groups if all("per_class_accuracy" in result for result in group.results)]
    if not told or len({tuple(in_order(group)) for group in told}) > 1:
        return None
    order, names = in_order(told[0]), names_of(told[0].results[0])
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes, x = figure.subplots(), np.arange(len(order))
    for i, group in enumerate(told):
        each = np.array([result["per_class_accuracy"] for result in group.results], np.float64)[:, order]
        marker, beside = _MARKERS[i % len(_MARKERS)], 0.5 * ((i + 0.5) / len(told) - 0.5)
        style: Any = {"color": color_of(group.strategy), "marker": marker, "ms": 5 if len(order) <= NAMED else 3}
        axes.plot(x + beside, 100 * each.mean(0), ls="", alpha=0.85, clip_on=False, label=group.label, **style)
    for begin in np.cumsum([len(task) for task in told[0].results[0]["tasks"]])[:-1]:
        if begin < len(order):
            axes.axvline(begin - 0.5, color="#8a939c", lw=0.8, ls=":")
    _name(axes, [names[label] for label in order], "x")
    axes.set_xlim(-0.7, len(order) - 0.3)
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.set_ylabel("accuracy")
    axes.grid(axis="y")
    axes.tick_params(length=0)
    figure.legend(loc="outside upper center", ncols=min(3, len(told)))
    return figure


def confusion(groups: Sequence[Group]) -> Figure | None:
    """Of each class's rows the share that each class is chosen for, mean over seeds; a panel a group."""
    told = [group for group in groups if all("confusion" in result for result in group.results)]
    if not told:
        return None
    side = min(5.0, max(3.0, 0.3 * max(len(group.results[0]["confusion"]) for group in told)))
    figure, panels = panels_of(told, side + 0.3, side + 0.7, "class")
    for axes, group in zip(panels, told, strict=True):
        counts = np.array([result["confusion"] for result in group.results], np.float64)
        order, names = in_order(group), names_of(group.results[0])
        shares = (counts / np.maximum(counts.sum(2, keepdims=True), 1)).mean(0)[np.ix_(order, order)]
        image = axes.imshow(100 * shares, cmap=BLUES, vmin=0, vmax=100)
        for axis in "xy":
            _name(axes, [names[label] for label in order], axis)
        axes.set_xlabel("taken for")
    bar = figure.colorbar(image, ax=panels, aspect=30, shrink=0.8, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    bar.outline.set_visible(False)
    return figure


def _name(axes: Axes, names: Sequence[str], axis: str) -> None:
    """Writes the classes at an axis, or of many their places alone."""
    if len(names) > NAMED:
        (axes.xaxis if axis == "x" else axes.yaxis).set_major_locator(MaxNLocator(10, integer=True))
        return
    short = [name if len(name) <= 18 else f"{name[:17]}…" for name in names]
    if axis == "x":
        turned = max(map(len, short)) > 3
        axes.set_xticks(range(len(names)), short, rotation=60 if turned else 0, ha="right" if turned else "center")
    else:
        axes.set_yticks(range(len(names)), short)
