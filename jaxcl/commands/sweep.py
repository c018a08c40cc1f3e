"""Searches hyper-parameters, chooses on validation data, and evaluates the choice on the test set.

    jaxcl sweep --config=digits --workdir=DIR --devices=8
    jaxcl sweep --config=digits --workdir=DIR --config.strategy=der --vmap

What is searched is said by `get_sweep()` in the config file, called with the argument of `get_config` if it has one: see
`jaxcl.search.sweep.Sweep`. The validation rows are held out of the training data; only the last row of the table has seen the
test set. Each run has its own folder below DIR; those that are finished are not run again, an unfinished one is continued.
Leaves DIR/sweep.json and DIR/report.html; files of these names that are not of an earlier sweep are refused.
"""

import jax

from jaxcl import cli, report
from jaxcl.errors import UserError
from jaxcl.search.sweep import Sweep, rows, run_sweep


def main() -> None:
    config, workdir = cli.config_and_workdir()
    sweep = load_sweep(cli.config_path())
    report.check_out(workdir)
    found = run_sweep(config, sweep, workdir, together=cli.VMAP.value, **cli.run_options())
    if jax.process_index() > 0:
        return
    print(report.text_table(rows(found)))
    runs = report.load_runs([workdir / found["test"]["folder"]])
    caption = (
        "Mean ± standard deviation over seeds. The setting is chosen on validation rows, held out of the training data of "
        "every task; the last row is the one chosen, trained on all of them and evaluated on the test set, as are the "
        "table above and the pictures."
    )
    section = report.Section(f"Sweep of {found['name']}, {found['strategy']}", caption, rows(found))
    print(f"pictures and page: {report.write_report(runs, workdir, [section])}")


def load_sweep(path: str) -> Sweep:
    """What `get_sweep` of a config file returns; `path` as given to --config.

    Raises:
      UserError: the file has none, or it returns something else.
    """
    sweep = cli.from_config_file(path, "get_sweep")
    if sweep is None:
        raise UserError(f"--config: {path} has no get_sweep(), which says what to search")
    if not isinstance(sweep, Sweep):
        raise UserError(f"--config: get_sweep() of {path} returns {sweep!r}, it must return a jaxcl.search.sweep.Sweep")
    return sweep


def command() -> None:
    cli.run(main, takes=(cli.VMAP, *cli.RUN))
