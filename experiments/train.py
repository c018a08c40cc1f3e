"""Trains one strategy over a sequence of tasks.

    python -m experiments.train --config=configs/digits.py --workdir=DIR [--devices=8] [--config.buffer.capacity=400 ...]
"""

from experiments import main as common


def main() -> None:
    config, workdir = common.required(common.CONFIG), common.required(common.WORKDIR)
    from jaxcl import report
    from jaxcl.training.loop import train_and_evaluate

    train_and_evaluate(config, workdir)
    print(report.table(report.load_runs([workdir])))


if __name__ == "__main__":
    common.run(main)
