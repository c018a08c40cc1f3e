"""Pictures. Every function returns a Figure; none touches pyplot, so nothing global changes."""

import io
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxcl import marks
from jaxcl.report.runs import ACCURACY, Group, Measure, common_measure
from jaxcl.summaries import accuracy_so_far

# Okabe & Ito 2008, a palette for every kind of colour vision. A strategy's colour does not depend on which others ran.
COLORS = {
    "from_scratch": "#009E73",
    "incremental": "#D55E00",
    "er": "#0072B2",
    "der": "#56B4E9",
    "der_pp": "#CC79A7",
    "agem": "#E69F00",
}
_OTHER_COLORS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#882255")  # Tol's muted palette
# In the order of a step, by the names of Bouvier et al. 2024; then what is beside the steps.
STEP = {"load": "#E69F00", "wait": "#D55E00", "assemble": "#F0E442", "accumulate": "#CC79A7", "train": "#0072B2"}
_FOREGROUND = STEP | {"compile": "#999999", "evaluate": "#009E73"}
BACKGROUND = {"copy": "#CC6677", "sample": "#DDCC77", "exchange": "#88CCEE", "populate": "#44AA99"}
_OTHER_PHASE_COLORS = ("#56B4E9", "#332288", "#882255", "#117733", "#AA4499", "#999933")
STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": "#8a939c",
    "axes.labelcolor": "#39424b",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e8ec",
    "xtick.color": "#5b6670",
    "ytick.color": "#5b6670",
    "legend.frameon": False,
    "text.parse_math": False,  # a label holds a user's words, of which a $ is one
}
_BLUES = LinearSegmentedColormap.from_list("blues", ["#f7fafd", "#9cc4e4", "#0072B2", "#023a5c"])


def color_of(strategy: str) -> str:
    return COLORS.get(strategy) or _OTHER_COLORS[zlib.crc32(strategy.encode()) % len(_OTHER_COLORS)]


def _panels(groups: Sequence[Group], width: float, height: float, ylabel: str) -> tuple[Figure, list[Axes]]:
    """A titled panel a group; see `_grid`."""
    figure, panels = _grid(len(groups), width, height)
    for i, (axes, group) in enumerate(zip(panels, groups, strict=True)):
        axes.set_title(group.label, color=color_of(group.strategy), loc="left")
        axes.tick_params(length=0)
        if i % 3 == 0:
            axes.set_ylabel(ylabel)
    return figure, panels


def _grid(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Panels in rows of three, each `width` x `height` inches."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 1, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _task_axis(axes: Axes, tasks: int) -> None:
    axes.set_xlim(0.8, tasks + 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(min(tasks, 10), integer=True))
    axes.set_xlabel("tasks trained")


def _measure_axis(axes: Axes, measure: Measure) -> None:
    axes.set_ylim(0, measure.full)
    if measure is ACCURACY:
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.grid(axis="y")
    axes.tick_params(length=0)


def _curve(axes: Axes, measure: Measure, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    """Mean over seeds of y [seeds, points], with a band of one standard deviation."""
    mean = measure.scale * y.mean(0)
    axes.plot(x, mean, clip_on=False, **style)
    if len(y) > 1:
        std = measure.scale * y.std(0, ddof=1)
        low, high = np.clip(mean - std, 0, measure.full), np.clip(mean + std, 0, measure.full)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)


def accuracy_by_task(groups: Sequence[Group]) -> Figure:
    """Accuracy (or error) on each task from the moment it was trained; a panel a strategy."""
    measure = common_measure(groups)
    most = max(group.matrices.shape[1] for group in groups)
    shades = colormaps["viridis"](np.linspace(0.0, 0.88, most))
    figure, panels = _panels(groups, 3.3, 3.0, f"{measure.name} on each task")
    for axes, group in zip(panels, groups, strict=True):
        tasks = group.matrices.shape[1]
        for j in range(tasks):
            x = np.arange(j, tasks)
            style = {"color": shades[j], "lw": 2, "marker": "o", "ms": 4 if tasks <= 12 else 2}
            _curve(axes, measure, x + 1, group.matrices[:, j:, j], label=f"task {j + 1}", **style)
        _measure_axis(axes, measure)
        _task_axis(axes, tasks)
        axes.tick_params(labelleft=bool(axes.get_ylabel()))  # one scale for all
    if most <= 10:
        longest = max(panels, key=lambda axes: len(axes.lines))
        figure.legend(*longest.get_legend_handles_labels(), loc="outside right center")
    else:
        scale = ScalarMappable(BoundaryNorm(np.arange(most + 1) + 0.5, most), ListedColormap(shades))
        bar = figure.colorbar(scale, ax=panels, label="task", aspect=40, pad=0.02)
        bar.set_ticks([t + 1 for t in _ticks(most)])
        bar.minorticks_off()
        bar.outline.set_visible(False)
    return figure


def _ticks(tasks: int) -> list[int]:
    """Indices of the tasks to name on an axis: all, or six of many."""
    return list(range(tasks)) if tasks <= 12 else sorted({round(t) for t in np.linspace(0, tasks - 1, 6)})


def accuracy_matrix(groups: Sequence[Group]) -> Figure:
    """The matrix as a heat map, mean over seeds, accuracies in percent; a panel a strategy."""
    measure = common_measure(groups)
    full = measure.full or max(group.matrices.mean(0).max() for group in groups)
    side = min(5.0, max(2.6, 0.5 * max(group.matrices.shape[1] for group in groups)))
    figure, panels = _panels(groups, side + 0.4, side + 0.8, "after training task")
    for axes, group in zip(panels, groups, strict=True):
        matrix = measure.scale * group.matrices.mean(0)
        tasks = len(matrix)
        image = axes.imshow(matrix, cmap=_BLUES, vmin=0, vmax=full)
        if tasks <= 12:
            for i, j in np.ndindex(matrix.shape):
                share, text = matrix[i, j] / full, f"{matrix[i, j]:.{0 if measure is ACCURACY else 3}f}"
                color = "#9aa4ad" if j > i and share < 0.5 else "white" if share > 0.55 else "#23292f"
                size = 9 if tasks <= 6 else 7
                axes.text(j, i, text, ha="center", va="center", color=color, fontsize=size)
        # A stair under the tasks not trained yet.
        steps = np.arange(tasks) + 0.5
        axes.step(np.append(steps, tasks - 0.5), np.append(steps - 1, tasks - 0.5), where="pre", color="#23292f", lw=1)
        axes.set_xticks(_ticks(tasks), [str(t + 1) for t in _ticks(tasks)])
        axes.set_yticks(_ticks(tasks), [str(t + 1) for t in _ticks(tasks)])
        axes.spines[:].set_visible(False)
        axes.set_xlabel("tested on task")
    bar = figure.colorbar(image, ax=panels, aspect=30, shrink=0.8, pad=0.02)
    if measure is ACCURACY:
        bar.ax.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    bar.outline.set_visible(False)
    return figure


def time_by_phase(groups: Sequence[Group]) -> Figure:
    """Seconds in each phase, mean over seeds, stacked; a bar a strategy.

    A thread that works in the background has a bar of its own, hatched, below that of the loop. Its time is part of the loop's.
    """
    return _time_bars(groups, _mean_seconds(groups, "seconds_by_phase"))


def time_of_steps(groups: Sequence[Group]) -> Figure:
    """As `time_by_phase`, of the loop the phases of the steps alone."""
    means = _mean_seconds(groups, "seconds_by_phase")
    return _time_bars(groups, [Counter({phase: m[phase] for phase in STEP if phase in m}) for m in means])


def _time_bars(groups: Sequence[Group], fore: Sequence[Counter[str]]) -> Figure:
    back = _mean_seconds(groups, "background_seconds")
    both = any(back)
    figure = Figure(figsize=(8, (0.75 if both else 0.55) * len(groups) + 1.5), layout="constrained")
    axes = figure.subplots()
    y, height = np.arange(len(groups)), 0.36 if both else 0.62
    right = _stack(axes, y - 0.2 * np.array([bool(bar) for bar in back]), height, fore, _FOREGROUND)
    if both:
        right = np.maximum(right, _stack(axes, y + 0.2, height, back, BACKGROUND, " (background)", hatch="///"))
    axes.set_yticks(y, [group.label for group in groups])
    for tick, group in zip(axes.get_yticklabels(), groups, strict=True):
        tick.set(color=color_of(group.strategy), fontweight="bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * right.max() or 1)
    axes.set_xlabel("seconds")
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
    figure.legend(loc="outside upper center", ncols=min(4 if both else 6, len(axes.containers)))
    return figure


def _mean_seconds(groups: Sequence[Group], key: str) -> list[Counter[str]]:
    """Seconds by phase under result[key], of each group the mean over its runs; empty where no run tells."""
    means = []
    for group in groups:
        mean: Counter[str] = Counter()
        for result in group.results:
            mean.update({phase: seconds / len(group.results) for phase, seconds in result.get(key, {}).items()})
        means.append(mean)
    return means


def _stack(
    axes: Axes,
    y: np.ndarray,
    height: float,
    bars: Sequence[Counter[str]],
    known: dict[str, str],
    suffix: str = "",
    **style: Any,
) -> np.ndarray:
    """Draws stacked horizontal bars, the known phases in their order and any others after them -> where they end."""
    others = sorted({phase for bar in bars for phase in bar} - known.keys())
    colors = known | {p: _OTHER_PHASE_COLORS[i % len(_OTHER_PHASE_COLORS)] for i, p in enumerate(others)}
    right = np.zeros(len(bars))
    for phase in (phase for phase in colors if any(phase in bar for bar in bars)):
        width = np.array([bar[phase] for bar in bars])
        style |= {"color": colors[phase], "edgecolor": "white", "lw": 0.8, "label": phase + suffix}
        axes.barh(y, width, height, right, **style)
        right += width
    for at, end, bar in zip(y, right, bars, strict=True):
        if bar:
            axes.annotate(f"{end:.4g} s", (end, at), (5, 0), textcoords="offset points", va="center")
    return right


def average_accuracy(groups: Sequence[Group]) -> Figure:
    """Mean accuracy (or error) over the tasks seen so far, after each task; all strategies together."""
    measure = common_measure(groups)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    seen: Counter[str] = Counter()  # variants of one strategy share its colour and differ in their dashes
    for group in groups:
        dashes = ("-", "--", ":", "-.")[seen[group.strategy] % 4]
        seen[group.strategy] += 1
        curves = np.stack([accuracy_so_far(matrix) for matrix in group.matrices])
        style = {"color": color_of(group.strategy), "ls": dashes, "lw": 2.2, "marker": "o", "ms": 5}
        _curve(axes, measure, np.arange(1, curves.shape[1] + 1), curves, label=group.label, **style)
    _measure_axis(axes, measure)
    _task_axis(axes, max(group.matrices.shape[1] for group in groups))
    axes.set_ylabel(f"average {measure.name}, tasks seen so far")
    figure.legend(loc="outside upper center", ncols=min(3, len(groups)))
    return figure


def classes_over_time(streams: Mapping[str, np.ndarray]) -> Figure:
    """Of what arrives at each moment, the share of every class; a panel a stream, tasks divided by lines.

    Args:
      streams: title -> rows of each class in each task, int `[T, K]`, in order of arrival.
    """
    figure, panels = _grid(len(streams), 3.3, 2.6)
    norm = PowerNorm(0.5, 0, max((rows / rows.sum(1, keepdims=True)).max() for rows in streams.values()))
    for axes, (title, rows) in zip(panels, streams.items(), strict=True):
        edges = np.concatenate([[0], np.cumsum(rows.sum(1))])
        shares = rows / rows.sum(1, keepdims=True)
        image = axes.pcolormesh(edges, np.arange(rows.shape[1] + 1) - 0.5, shares.T, cmap=_BLUES, norm=norm)
        axes.vlines(edges[1:-1], -0.5, rows.shape[1] - 0.5, color="#5b6670", lw=0.6)
        axes.set_title(title, loc="left")
        axes.set_xlabel("rows that have arrived")
        axes.set_ylabel("class")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(min(10, rows.shape[1]), integer=True))
        axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=panels, aspect=30, shrink=0.8, pad=0.02, label="share of what arrives")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)
    return figure


def png(draw: Callable[[], Figure]) -> bytes:
    """What `draw` draws, in the style of the report, as a PNG file."""
    file = io.BytesIO()
    with rc_context(STYLE):  # restored on leaving: a library does not restyle its caller
        draw().savefig(file, format="png", dpi=160, metadata=marks.PNG)
    return file.getvalue()
