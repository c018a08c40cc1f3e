"""What runs found, as pictures, a plain-text table and one self-contained HTML page. Needs no JAX.

A run is a folder with result.json. Runs of one strategy that differ only in their seed are summarised together (mean,
and standard deviation over seeds); where a strategy ran in several configurations, its label names what differs.
"""

from jaxcl.report.page import Section, check_out, write_report
from jaxcl.report.pictures import classes_over_time
from jaxcl.report.runs import Group, Run, group_runs, load_runs
from jaxcl.report.style import color_of, png
from jaxcl.report.tables import spread, table, text_table

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
