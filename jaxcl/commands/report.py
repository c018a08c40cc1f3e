"""Turns finished runs into pictures and one HTML page.

jaxcl report runs/digits
jaxcl report runs/er runs/der --out=runs/both

Finds every run (a folder with result.json) below each DIR, prints the table, and writes report.html and its pictures
into --out, by default the first DIR. Files of the same names that are not of an earlier report are refused.
"""

from jaxcl import cli, report
from jaxcl.errors import UserError


def main(folders: list[str]) -> None:
    if not folders:
        raise UserError("DIR: missing; give at least one folder of runs")
    runs, out = report.load_runs(folders), cli.OUT.value or folders[0]
    report.check_out(out)
    print(report.table(runs))
    print(report.write_report(runs, out))


def command() -> None:
    cli.run(main, positional=True, takes=(cli.OUT,))
