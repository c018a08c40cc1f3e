"""Turns finished runs into pictures and one HTML page.

python -m experiments.report DIR... [--out=DIR]

Finds every run (a folder with result.json) below each DIR, prints the table, and writes report.html and its pictures
into --out, by default the first DIR.
"""

from experiments import cli
from jaxcl import report
from jaxcl.errors import UserError


def main(folders: list[str]) -> None:
    if not folders:
        raise UserError("DIR: missing; give at least one folder of runs")
    runs = report.load_runs(folders)
    print(report.table(runs))
    print(report.write_report(runs, cli.OUT.value or folders[0]))


if __name__ == "__main__":
    cli.run(main, positional=True)
