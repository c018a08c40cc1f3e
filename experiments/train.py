"""Trains one strategy over a sequence of tasks.

python -m experiments.train --config=configs/digits.py --workdir=DIR [--devices=8] [--config.buffer.capacity=400 ...]
"""

import pathlib

from experiments import main as common
from jaxcl import report
from jaxcl.training import workdir as workdir_lib
from jaxcl.training.loop import train_and_evaluate


def main() -> None:
    config, workdir = common.required(common.CONFIG), pathlib.Path(common.required(common.WORKDIR))
    if common.OVERWRITE.value:
        workdir_lib.clear(workdir)
    train_and_evaluate(config, workdir)
    print(report.table(report.load_runs([workdir])))


if __name__ == "__main__":
    common.run(main)
