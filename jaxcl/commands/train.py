"""Trains one strategy over a sequence of tasks.

jaxcl train --config=digits --workdir=DIR --devices=8
jaxcl train --config=digits --workdir=DIR --config.buffer.capacity=400 --config.writers="('csv',)"
jaxcl train --help_config

An unfinished run in DIR is continued from its last checkpoint, on any number of devices. Several processes, on one host or
many: the same command for each, with --distributed or with --coordinator=HOST:PORT --num_processes=N --process_id=I; see
docs/distributed.md.
"""

import jax

from jaxcl import cli, report
from jaxcl.training.loop import train_and_evaluate


def main() -> None:
    config, workdir = cli.config_and_workdir()
    train_and_evaluate(config, workdir, **cli.run_options())
    if jax.process_index() == 0:
        print(report.table(report.load_runs([workdir])))
        print(f"the run is in {workdir}; to look at it: jaxcl report {workdir}, or tensorboard --logdir {workdir}")


def command() -> None:
    cli.run(main, takes=cli.RUN)
