"""Plain-text tables."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxcl.report.runs import Group, Run, common_measure, group_runs
from jaxcl.summaries import mean_and_deviation


def spread(values: ArrayLike, scale: float = 100, digits: int = 2) -> str:
    """Values of several seeds as mean ± sample standard deviation; of one seed the value alone."""
    mean, deviation = mean_and_deviation(scale * np.asarray(values, np.float64))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}" if np.size(values) > 1 else f"{mean:.{digits}f}"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def rows_of(groups: Sequence[Group]) -> list[list[str]]:
    """The header, then a row a group."""
    top5 = any("average_top5" in result for group in groups for result in group.results)
    m = common_measure(groups)
    measured = [f"{x}{m.unit}" for x in (m.name, "incremental", "forgetting", "backward transfer")]
    rows = [["strategy", "seeds", *measured, *(["top-5 %"] if top5 else []), "seconds", "images/s", "buffer"]]
    for g in groups:
        row = [g.label, str(len(g.results))]
        keys: list[tuple[str, ...]] = [(f"average_{m.name}",), (f"average_incremental_{m.name}",)]
        keys += [("forgetting", "chaudhry"), ("backward_transfer", "gem")]
        row += [spread(g.values(*path), m.scale, m.digits) for path in keys]
        if top5:
            row.append(spread(g.values("average_top5")) if all("average_top5" in r for r in g.results) else "-")
        row += [spread(g.values("seconds"), 1, 1), f"{g.values('images_per_second').mean():,.0f}"]
        row.append(_bytes(g.values("buffer", "bytes").mean()) if g.results[0]["buffer"] else "-")
        rows.append(row)
    return rows


def unfinished(runs: Iterable[Run]) -> list[str]:
    return [f"{run.path}: {run.problem}" for run in runs if run.problem]


def table(runs: Sequence[Run]) -> str:
    """Plain text: a line a strategy (percent, mean ± standard deviation over seeds), then a line a run without result.

    Forgetting is Chaudhry's, backward transfer GEM's (jaxcl/summaries.py).
    """
    groups = group_runs(runs)
    return "\n".join([*([text_table(rows_of(groups))] if groups else []), *unfinished(runs)])


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells, the header first, aligned: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
