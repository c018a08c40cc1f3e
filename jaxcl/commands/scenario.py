"""Draws scenarios: of what arrives over time, the share of every class.

    jaxcl scenario --config=digits --out=FILE.png
    jaxcl scenario --config=digits --out=FILE.png --scenarios=class,blurry,si_blurry

Draws the scenario of the config, or a panel for each of --scenarios, with the config's other fields.
"""

import pathlib

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxcl import cli, report
from jaxcl.check import Rule, check
from jaxcl.data import SCENARIOS
from jaxcl.errors import UserError
from jaxcl.training.build import make_tasks
from jaxcl.training.config import check_config, default_config

KINDS = flags.DEFINE_list("scenarios", [], f"of {', '.join(SCENARIOS)}; default: that of the config")


def main() -> None:
    config, out = cli.required(cli.CONFIG), cli.required(cli.OUT)
    check("--out", out, Rule(lambda x: x.endswith(".png"), "a name that ends with .png"))
    configs = {}
    for kind in KINDS.value or [config.data.scenario]:
        one = config.copy_and_resolve_references()
        one.data.scenario = kind
        one.mesh = default_config().mesh  # of what is shown nothing depends on it
        check_config(one, devices=1)
        configs[kind] = one
    streams = {kind: rows_by_class(one) for kind, one in configs.items()}
    try:
        pathlib.Path(out).write_bytes(report.png(lambda: report.classes_over_time(streams)))
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror or error}") from error
    print(out)


def rows_by_class(config: ConfigDict) -> np.ndarray:
    """Train rows of each class in each task, int `[T, K]`."""
    scenario, train, _ = make_tasks(config)
    return np.stack([np.bincount(train.labels[t.train], minlength=scenario.num_classes) for t in scenario.tasks])


def command() -> None:
    cli.run(main, takes=(cli.CONFIG, KINDS, cli.OUT, cli.HELP_CONFIG))
