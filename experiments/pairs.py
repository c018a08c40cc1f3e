"""Trains one contrastive run on pairs and prints what it retrieves.

python -m experiments.pairs --config=configs/memory_bank_emoji.py --config.data.source=emoji:FILE --workdir=DIR
    [--config.negatives=momentum ...] [--devices=8]

An unfinished run in DIR is continued from its last checkpoint, on any number of devices; several processes as in
experiments.train. What the kinds of negatives are worth is measured by experiments.memory_bank.
"""

import pathlib

import jax

from experiments import main as common
from jaxcl.contrastive.train import train_and_evaluate


def main() -> None:
    config, workdir = common.required(common.CONFIG), pathlib.Path(common.required(common.WORKDIR))
    result = train_and_evaluate(config, workdir, overwrite=common.OVERWRITE.value, stall_seconds=common.STALL.value)
    if jax.process_index() == 0:
        for scores in result["evaluations"]:
            recall = "  ".join(f"{name} {100 * x:.1f} %" for name, x in scores.items() if "@" in name)
            print(f"step {scores['step']}: {recall}")


if __name__ == "__main__":
    common.run(main)
