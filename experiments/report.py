"""Turns finished runs into pictures and one HTML page.

python -m experiments.report DIR... [--out=DIR]

Finds every run (a folder with result.json) below each DIR, prints the table, and writes report.html and its pictures
into --out, by default the first DIR.
"""

from collections.abc import Sequence

from absl import app, flags

from jaxcl import report
from jaxcl.errors import UserError

_OUT = flags.DEFINE_string("out", None, "Folder of the report; the first DIR if not given.")


def main(argv: Sequence[str]) -> None:
    folders = argv[1:]
    if not folders:
        raise app.UsageError("Give at least one folder of runs: python -m experiments.report DIR... [--out=DIR]")
    try:
        runs = report.load_runs(folders)
        print(report.table(runs))
        print(report.write_report(runs, _OUT.value or folders[0]))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    app.run(main)
