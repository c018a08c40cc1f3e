"""What the pictures share: colours, axes, a file."""

import pathlib
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def panels(columns: int, rows: int = 1, width: float = 3.6, height: float = 2.9) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.ravel():
        one.grid(axis="y", color="#e4e8ec")
        one.set_axisbelow(True)
    return figure, [list(row) for row in axes]


def save(picture: Any, found: Any, path: pathlib.Path) -> None:
    with rc_context(STYLE):
        picture(found).savefig(path, dpi=110)
