"""What runs found, as pictures, a plain-text table and one self-contained HTML page. Needs no JAX.

A run is a folder with result.json. Runs of one strategy that differ only in their seed are summarised together (mean,
and standard deviation over seeds); where a strategy ran in several configurations, its label names what differs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxcl.report.page import Section, check_out, write_report
from jaxcl.report.runs import Group, Run, group_runs, load_runs
from jaxcl.report.tables import spread, table, text_table

if TYPE_CHECKING:
    from jaxcl.report.pictures import classes_over_time
    from jaxcl.report.style import color_of, png

_DRAWING = {"classes_over_time": "pictures", "color_of": "style", "png": "style"}  # and their files

__all__ = [
    "Group",
    "Run",
    "Section",
    "check_out",
    "classes_over_time",
    "color_of",
    "group_runs",
    "load_runs",
    "png",
    "spread",
    "table",
    "text_table",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """What draws, imported when it is first asked for: Matplotlib takes a second."""
    if name not in _DRAWING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxcl.report.{_DRAWING[name]}"), name)
