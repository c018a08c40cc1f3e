"""What runs found, as pictures, a plain-text table and one self-contained HTML page. Needs no JAX.

A run is a folder with result.json. Runs of one strategy that differ only in their seed are summarised together (mean,
and standard deviation over seeds); where a strategy ran in several configurations, its label names what differs.
"""

import base64
import functools
import html
import io
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxcl.errors import UserError
from jaxcl.metrics import accuracy_so_far

# Okabe & Ito 2008, a palette for every kind of colour vision. A strategy keeps its colour from page to page, so it may
# not depend on which others ran.
_COLORS = {
    "from_scratch": "#009E73",
    "incremental": "#D55E00",
    "er": "#0072B2",
    "der": "#56B4E9",
    "derpp": "#CC79A7",
    "agem": "#E69F00",
}
_OTHER_COLORS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#882255")  # Tol's muted palette
_ORDER = ("from_scratch", "incremental", "er")
# In the order of a step, by the names of Bouvier et al. 2024; then what is beside the steps.
_STEP = {"load": "#E69F00", "wait": "#D55E00", "assemble": "#F0E442", "accumulate": "#CC79A7", "train": "#0072B2"}
_FOREGROUND = _STEP | {"compile": "#999999", "evaluate": "#009E73"}
_BACKGROUND = {"copy": "#CC6677", "sample": "#DDCC77", "exchange": "#88CCEE", "populate": "#44AA99"}
_OTHER_PHASE_COLORS = ("#56B4E9", "#332288", "#882255", "#117733", "#AA4499", "#999933")
_PER_RUN = {"seed", "name", "workdir"}  # config fields that do not make a different experiment
_STYLE: Any = {
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
}
_BLUES = LinearSegmentedColormap.from_list("blues", ["#f7fafd", "#9cc4e4", "#0072B2", "#023a5c"])


@dataclass(frozen=True)
class Measure:
    """What the matrix of a run holds.

    Attributes:
      name: in the keys of result.json and in titles.
      unit: appended to the heads of columns.
      scale: from the matrix to what is shown.
      digits: behind the point, in the table.
      full: what is shown of a perfect or worthless entry: the end of an axis; None: the data's own.
      forgets: what a curve does when a task is forgotten.
    """

    name: str
    unit: str
    scale: float
    digits: int
    full: float | None
    forgets: str


_ACCURACY = Measure("accuracy", " %", 100, 2, 100, "falls")
_ERROR = Measure("error", "", 1, 4, None, "rises")


@dataclass(frozen=True)
class Run:
    """One run found on disk.

    Attributes:
      path: its folder.
      result: the content of result.json; {} unless finished.
      problem: why there is no result, in one line; "" when finished.
    """

    path: Path
    result: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Group:
    """Finished runs of one strategy and configuration, one a seed."""

    label: str
    strategy: str
    results: list[dict[str, Any]]

    def values(self, *keys: str) -> np.ndarray:
        """The number under result[keys[0]][keys[1]]..., seed by seed."""
        values: list[Any] = self.results
        for key in keys:
            values = [value[key] for value in values]
        return np.asarray(values, np.float64)

    @property
    def matrices(self) -> np.ndarray:
        """[seeds, T, T] accuracies in 0..1, or errors."""
        return self.values(f"{_measure(self.results[0]).name}_matrix")


# Reading


def _measure(result: dict[str, Any]) -> Measure:
    return _ERROR if "error_matrix" in result else _ACCURACY


def _common_measure(groups: Sequence[Group]) -> Measure:
    """What all runs measure.

    Raises:
      UserError: not all measure the same.
    """
    found = {_measure(result) for group in groups for result in group.results}
    if len(found) > 1:
        raise UserError("run folders: some runs measure accuracy, others error; give runs of one kind")
    return found.pop()


def _check(result: Any) -> None:
    """Raises ValueError, KeyError or TypeError where the report would stumble later."""
    if not isinstance(result, dict):
        raise ValueError("not a JSON object")
    measure = _measure(result)
    key = f"{measure.name}_matrix"
    matrix = np.asarray(result[key], np.float64)
    tasks = len(result["tasks"])
    if tasks < 1 or matrix.shape != (tasks, tasks):
        raise ValueError(f"{key} has shape {matrix.shape}; allowed: {(tasks, tasks)}, the number of tasks")
    if not ((matrix >= 0) & (matrix <= (1 if measure is _ACCURACY else np.inf))).all():
        raise ValueError(f"{key} has values outside {'0..1' if measure is _ACCURACY else '0..'}")
    for key in ("strategy", "source", "model"):
        if not isinstance(result[key], str):
            raise ValueError(f"{key} is not a string")
    for key in ("seconds_by_phase", "devices", "versions", "config"):
        if not isinstance(result[key], dict):
            raise ValueError(f"{key} is not an object")
    averages = (f"average_{measure.name}", f"average_incremental_{measure.name}")
    numbers = [result[key] for key in ("seed", *averages, "seconds")]
    numbers += [result["images_per_second"], result["devices"]["count"], *result["seconds_by_phase"].values()]
    numbers += result.get("background_seconds", {}).values()
    numbers += [result["forgetting"][key] for key in ("chaudhry", "mammoth", "avalanche")]
    numbers += [result["backward_transfer"][key] for key in ("gem", "diaz_rodriguez")]
    numbers += [result["buffer"]["bytes"]] if result["buffer"] is not None else []
    numbers += [result["average_top5"]] if "average_top5" in result else []
    if not np.isfinite(np.asarray(numbers, np.float64)).all():
        raise ValueError("a number is not finite")


def _read(path: Path) -> Run:
    try:
        result = json.loads((path / "result.json").read_text())
        _check(result)
    except KeyError as error:
        return Run(path, problem=f"malformed result.json: no {error.args[0]!r}")
    except (ValueError, TypeError, AttributeError, OSError) as error:
        return Run(path, problem=f"malformed result.json: {' '.join(str(error).split())}")
    return Run(path, result)


def load_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Every run at or below the given folders, once each, sorted by folder.

    A folder with config.json but no result.json is an unfinished run, unless it lies inside or above another run (a
    checkpoint keeps a config too).

    Raises:
      UserError: for a path that is no folder, or when there is no run at all.
    """
    roots = [Path(path) for path in paths]
    for root in roots:
        if not root.is_dir():
            raise UserError(f"run folder: {str(root)!r} is not a folder; allowed: folders that hold runs")
    found = {file.parent.resolve(): file.parent for root in roots for file in sorted(root.rglob("result.json"))}
    runs = {place: _read(path) for place, path in found.items()}
    for file in sorted((file for root in roots for file in root.rglob("config.json")), key=lambda f: len(f.parts)):
        place = file.parent.resolve()
        if not any(place.is_relative_to(other) or other.is_relative_to(place) for other in runs):
            runs[place] = Run(file.parent, problem="unfinished: no result.json")
    if not runs:
        raise UserError(f"run folder: no run below {', '.join(map(str, roots))}; allowed: folders with a result.json")
    return [runs[place] for place in sorted(runs)]


# Grouping


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{key}" if prefix else key).items()}


def _facets(result: dict[str, Any]) -> dict[str, str]:
    """All that makes a run another experiment than its neighbour, by name."""
    config = _flat(result["config"])
    facets = {key: v for key, v in config.items() if key not in _PER_RUN and key.split(".")[-1] != "seed"}
    facets |= {"source": result["source"], "model": result["model"], "tasks": len(result["tasks"])}
    facets |= {"devices": result["devices"]["count"], "rehearsal": result["buffer"] is not None}
    return {key: json.dumps(value) if not isinstance(value, str) else value for key, value in facets.items()}


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Finished runs grouped over seeds; from_scratch, incremental and er first, then by name."""
    strategies: dict[str, dict[tuple, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if not run.problem:
            strategies[run.result["strategy"]][tuple(sorted(_facets(run.result).items()))].append(run)
    groups = []
    for strategy in sorted(strategies, key=lambda s: (_ORDER.index(s) if s in _ORDER else len(_ORDER), s)):
        variants = strategies[strategy]
        seen = Counter(facet for facets in variants for facet in facets)
        for facets, members in variants.items():
            differs = [f"{key.split('.')[-1]}={v}" for key, v in facets if seen[key, v] < len(variants)]
            label = ", ".join([strategy, *dict.fromkeys(differs[:3])]) + (", …" if len(differs) > 3 else "")
            groups.append(Group(label, strategy, [run.result for run in members]))
    return groups


def _color(strategy: str) -> str:
    return _COLORS.get(strategy) or _OTHER_COLORS[zlib.crc32(strategy.encode()) % len(_OTHER_COLORS)]


def _line_styles(groups: Sequence[Group]) -> list[str]:
    """Variants of one strategy share its colour and differ in their dashes."""
    seen: Counter[str] = Counter()
    styles = []
    for group in groups:
        styles.append(("-", "--", ":", "-.")[seen[group.strategy] % 4])
        seen[group.strategy] += 1
    return styles


# The table


def _spread(values: np.ndarray, scale: float = 100, digits: int = 2) -> str:
    """mean ± sample standard deviation; the latter only with several seeds."""
    mean = f"{values.mean() * scale:.{digits}f}"
    return f"{mean} ± {values.std(ddof=1) * scale:.{digits}f}" if len(values) > 1 else mean


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _rows(groups: Sequence[Group]) -> list[list[str]]:
    """The header, then a row a group."""
    top5 = any("average_top5" in result for group in groups for result in group.results)
    m = _common_measure(groups)
    header = [
        "strategy",
        "seeds",
        *(f"{x}{m.unit}" for x in (m.name, "incremental", "forgetting", "backward transfer")),
    ]
    rows = [[*header, *(["top-5 %"] if top5 else []), "seconds", "images/s", "buffer"]]
    for g in groups:
        row = [g.label, str(len(g.results))]
        keys: list[tuple[str, ...]] = [(f"average_{m.name}",), (f"average_incremental_{m.name}",)]
        keys += [("forgetting", "chaudhry"), ("backward_transfer", "gem")]
        row += [_spread(g.values(*path), m.scale, m.digits) for path in keys]
        if top5:
            row.append(_spread(g.values("average_top5")) if all("average_top5" in r for r in g.results) else "-")
        row += [_spread(g.values("seconds"), 1, 1), f"{g.values('images_per_second').mean():,.0f}"]
        row.append(_bytes(g.values("buffer", "bytes").mean()) if g.results[0]["buffer"] else "-")
        rows.append(row)
    return rows


def _unfinished(runs: Iterable[Run]) -> list[str]:
    return [f"{run.path}: {run.problem}" for run in runs if run.problem]


def table(runs: Sequence[Run]) -> str:
    """Plain text: a line a strategy (percent, mean ± standard deviation over seeds), then a line a run without result.

    Forgetting is Chaudhry's, backward transfer GEM's (jaxcl/metrics.py).
    """
    groups = group_runs(runs)
    return "\n".join([*([text_table(_rows(groups))] if groups else []), *_unfinished(runs)])


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells, the header first, aligned: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


# Pictures. Every function returns a Figure; none touches pyplot, so nothing global changes.


def _panels(groups: Sequence[Group], width: float, height: float, ylabel: str) -> tuple[Figure, list[Axes]]:
    """A titled panel a group, three in a row, each `width` x `height` inches."""
    columns = min(len(groups), 3)
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(width * columns + 1, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for i, axes in enumerate(panels):
        if i >= len(groups):
            axes.remove()
            continue
        axes.set_title(groups[i].label, color=_color(groups[i].strategy), loc="left")
        axes.tick_params(length=0)
        if i % columns == 0:
            axes.set_ylabel(ylabel)
    return figure, panels[: len(groups)]


def _task_axis(axes: Axes, tasks: int) -> None:
    axes.set_xlim(0.8, tasks + 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(min(tasks, 10), integer=True))
    axes.set_xlabel("tasks trained")


def _measure_axis(axes: Axes, measure: Measure) -> None:
    axes.set_ylim(0, measure.full)
    if measure is _ACCURACY:
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
    measure = _common_measure(groups)
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
    measure = _common_measure(groups)
    full = measure.full or max(group.matrices.mean(0).max() for group in groups)
    side = min(5.0, max(2.6, 0.5 * max(group.matrices.shape[1] for group in groups)))
    figure, panels = _panels(groups, side + 0.4, side + 0.8, "after training task")
    for axes, group in zip(panels, groups, strict=True):
        matrix = measure.scale * group.matrices.mean(0)
        tasks = len(matrix)
        image = axes.imshow(matrix, cmap=_BLUES, vmin=0, vmax=full)
        if tasks <= 12:
            for i, j in np.ndindex(matrix.shape):
                share, text = matrix[i, j] / full, f"{matrix[i, j]:.{0 if measure is _ACCURACY else 3}f}"
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
    if measure is _ACCURACY:
        bar.ax.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    bar.outline.set_visible(False)
    return figure


def time_by_phase(groups: Sequence[Group]) -> Figure:
    """Seconds in each phase, mean over seeds, stacked; a bar a strategy, and where a thread works in the background its own
    bar, hatched, below that of the loop, in whose time it lies."""
    return _time_bars(groups, _mean_seconds(groups, "seconds_by_phase"))


def time_of_steps(groups: Sequence[Group]) -> Figure:
    """As `time_by_phase`, of the loop the phases of the steps alone."""
    means = _mean_seconds(groups, "seconds_by_phase")
    return _time_bars(groups, [Counter({phase: m[phase] for phase in _STEP if phase in m}) for m in means])


def _time_bars(groups: Sequence[Group], fore: Sequence[Counter[str]]) -> Figure:
    back = _mean_seconds(groups, "background_seconds")
    both = any(back)
    figure = Figure(figsize=(8, (0.75 if both else 0.55) * len(groups) + 1.5), layout="constrained")
    axes = figure.subplots()
    y, height = np.arange(len(groups)), 0.36 if both else 0.62
    right = _stack(axes, y - 0.2 * np.array([bool(bar) for bar in back]), height, fore, _FOREGROUND)
    if both:
        right = np.maximum(right, _stack(axes, y + 0.2, height, back, _BACKGROUND, " (background)", hatch="///"))
    axes.set_yticks(y, [group.label for group in groups])
    for tick, group in zip(axes.get_yticklabels(), groups, strict=True):
        tick.set(color=_color(group.strategy), fontweight="bold")
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
    measure = _common_measure(groups)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for group, dashes in zip(groups, _line_styles(groups), strict=True):
        curves = np.stack([accuracy_so_far(matrix) for matrix in group.matrices])
        x = np.arange(1, curves.shape[1] + 1)
        _curve(
            axes,
            measure,
            x,
            curves,
            color=_color(group.strategy),
            ls=dashes,
            lw=2.2,
            marker="o",
            ms=5,
            label=group.label,
        )
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
    columns = min(len(streams), 3)
    figure = Figure(figsize=(3.3 * columns + 1, 2.6 * -(-len(streams) // columns)), layout="constrained")
    panels = list(figure.subplots(-(-len(streams) // columns), columns, squeeze=False).ravel())
    norm = PowerNorm(0.5, 0, max((rows / rows.sum(1, keepdims=True)).max() for rows in streams.values()))
    for axes, (title, rows) in zip(panels, streams.items(), strict=False):
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
    for axes in panels[len(streams) :]:
        axes.remove()
    bar = figure.colorbar(
        image, ax=panels[: len(streams)], aspect=30, shrink=0.8, pad=0.02, label="share of what arrives"
    )
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)
    return figure


def png(draw: Callable[[], Figure]) -> bytes:
    """What `draw` draws, in the style of the report, as a PNG file."""
    file = io.BytesIO()
    with rc_context(_STYLE):  # restored on leaving: a library does not restyle its caller
        draw().savefig(file, format="png", dpi=160)
    return file.getvalue()


_PICTURES: dict[str, tuple[Callable[[Sequence[Group]], Figure], str, str]] = {
    "average_accuracy": (
        average_accuracy,
        "Average {measure.name}",
        "Mean {measure.name} over the tasks seen so far, after each task. Bands: one standard deviation over seeds.",
    ),
    "accuracy_by_task": (
        accuracy_by_task,
        "{measure.name} on each task",
        "Each line is one task, from the moment it was trained. A line that {measure.forgets} is forgetting.",
    ),
    "accuracy_matrix": (
        accuracy_matrix,
        "{measure.name} matrix",
        "Mean over seeds, accuracies in percent. Above the stair: tasks not trained yet.",
    ),
    "time_by_phase": (
        time_by_phase,
        "Time by phase",
        "Seconds, mean over seeds. Hatched: the thread of the buffer in host memory, working while the loop goes on.",
    ),
    "time_of_steps": (time_of_steps, "Time of the steps", "The same without what comes once or between tasks."),
}


# The page

_CSS = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; color: #23292f; background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem }
p { margin: .25rem 0 .75rem; color: #5b6670 }
img { display: block; width: 100%; min-width: 36rem; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .5rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e8ec }
th { color: #5b6670; font-weight: 600; border-bottom: 2px solid #c9d1d8 }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 600 }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em }
ul { padding-left: 1.2rem; overflow-wrap: anywhere }
"""


def _html_table(groups: Sequence[Group]) -> str:
    header, *rows = ([html.escape(cell) for cell in row] for row in _rows(groups))
    for group, row in zip(groups, rows, strict=True):
        row[0] = f'<span class="dot" style="background:{_color(group.strategy)}"></span>{row[0]}'
    return _html_rows(header, rows)


def _html_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _about(groups: Sequence[Group]) -> str:
    """One line: what was run, on what."""
    results = [result for group in groups for result in group.results]

    def distinct(describe: Callable[[dict[str, Any]], str]) -> str:
        return " / ".join(dict.fromkeys(map(describe, results)))

    def devices(result: dict[str, Any]) -> str:
        return f"{result['devices']['count']} x {result['devices'].get('kind', 'device')}"

    def versions(result: dict[str, Any]) -> str:
        return ", ".join(f"{name} {version}" for name, version in result["versions"].items())

    parts = [distinct(lambda r: r["source"]), distinct(lambda r: f"{len(r['tasks'])} tasks")]
    parts += [distinct(lambda r: r["model"]), distinct(devices), distinct(versions)]
    return " · ".join(part for part in parts if part)


@dataclass(frozen=True)
class Section:
    """A table that a command adds to the page: text, and rows of equally many cells with the header first."""

    title: str
    caption: str
    rows: Sequence[Sequence[str]]


def write_report(runs: Sequence[Run], out: str | Path, sections: Sequence[Section] = ()) -> Path:
    """Writes five PNGs and report.html, which embeds them, into `out` (created if need be) -> path of the page.

    The sections come after the runs' own table. Runs without a result are listed on the page; with no finished run there
    are no pictures.

    Raises:
      UserError: if `out` is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {str(out)!r} is a file; allowed: a folder, or a path to make one at")
    out.mkdir(parents=True, exist_ok=True)
    groups = group_runs(runs)
    body = ["<h1>Continual learning runs</h1>"]
    if groups:
        body += [f"<p>{html.escape(_about(groups))}</p>", _html_table(groups)]
        body.append(
            "<p>Mean ± standard deviation over seeds. Forgetting: best earlier accuracy minus the last (Chaudhry et "
            "al. 2018). Backward transfer: last accuracy minus the first (Lopez-Paz &amp; Ranzato 2017). Of errors, the "
            "same with their signs turned: where an error rises, forgetting is positive.</p>"
        )
    for section in sections:
        body += [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.caption)}</p>"]
        header, *rows = ([html.escape(cell) for cell in row] for row in section.rows)
        body.append(_html_rows(header, rows))
    if groups:
        measure = _common_measure(groups)
        for name, (draw, *texts) in _PICTURES.items():
            title, caption = (text.format(measure=measure) for text in texts)
            title = title[0].upper() + title[1:]
            picture = png(functools.partial(draw, groups))
            (out / f"{name}.png").write_bytes(picture)
            source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
            body += [
                f"<h2>{title}</h2>",
                f"<p>{caption}</p>",
                f'<div class="scroll"><img alt="{title}" src="{source}"></div>',
            ]
    if problems := _unfinished(runs):
        items = "".join(f"<li>{html.escape(line)}</li>" for line in problems)
        body += ["<h2>Runs without a result</h2>", f"<ul>{items}</ul>"]
    page = out / "report.html"
    page.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>jaxcl report</title><style>{_CSS}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    return page
