"""What a run over tasks shows as it goes on: numbers by name, for the bar and for the writers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcl import summaries
from jaxcl.runs.session import Progress


def means_so_far(at: Progress) -> dict[str, float]:
    """Of every score, its mean over the tasks seen so far, after the last of them."""
    return {name: float(np.mean(rows[-1][: len(rows)])) for name, rows in at.scores.items()}


def evaluation_scalars(at: Progress) -> dict[str, float]:
    """The same, each task's own scores, and from the second task on how much is forgotten."""
    found = {f"evaluation/{name}": mean for name, mean in means_so_far(at).items()}
    for name, rows in at.scores.items():
        found |= {f"{name}_by_task/task_{j + 1}": float(x) for j, x in enumerate(rows[-1][: len(rows)])}
    for name, sign in (("accuracy", 1), ("error", -1)):
        rows = at.scores.get(name, [])
        if len(rows) > 1:
            matrix = sign * np.asarray(rows)[:, : len(rows)]
            found["evaluation/forgetting"] = summaries.forgetting_chaudhry(matrix)
            found["evaluation/backward_transfer"] = summaries.backward_transfer_gem(matrix)
    return found


def buffer_scalars(stats: Mapping[str, Any]) -> dict[str, float]:
    """Of `Buffer.stats`; {} without a buffer."""
    found = {f"buffer/{name}": float(x) for name, x in stats.items() if isinstance(x, int | float)}
    if held := [rows for rows in stats.get("class_histogram", []) if rows]:
        found |= {"buffer/classes": len(held), "buffer/rows_of_least_class": min(held)}
        found |= {"buffer/rows_of_most_class": max(held)}
    return found


def seconds_scalars(foreground: Mapping[str, float], background: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase so far, of the loop and of the writer of rows in host memory."""
    found = {f"seconds_foreground/{name}": seconds for name, seconds in foreground.items()}
    return found | {f"seconds_background/{name}": seconds for name, seconds in background.items()}
