"""Trains one strategy over a sequence of tasks.

python -m experiments.train --config=configs/digits.py --workdir=DIR [--devices=8] [--config.buffer.capacity=400 ...]
python -m experiments.train --help_config

An unfinished run in DIR is continued from its last checkpoint, on any number of devices. Several processes, on one host or
many: the same command for each, with --distributed or with --coordinator=HOST:PORT --num_processes=N --process_id=I; see
docs/distributed.md.
"""

import jax

from experiments import cli
from jaxcl import report
from jaxcl.training.loop import train_and_evaluate


def main() -> None:
    config, workdir = cli.config_and_workdir()
    train_and_evaluate(config, workdir, **cli.run_options())
    if jax.process_index() == 0:
        print(report.table(report.load_runs([workdir])))


if __name__ == "__main__":
    cli.run(main)
