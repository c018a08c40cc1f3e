"""Trains one contrastive run on pairs and prints what it retrieves.

jaxcl pairs --config=memory_bank_emoji --config.data.source=emoji:FILE --workdir=DIR --devices=8
jaxcl pairs --config=memory_bank_mnist --workdir=DIR --config.negatives=momentum
jaxcl pairs --help_config

An unfinished run in DIR is continued from its last checkpoint, on any number of devices; several processes as in
jaxcl train. What the kinds of negatives are worth is measured by experiments.studies.memory_bank.
"""

import jax

from jaxcl import cli
from jaxcl.contrastive import config as contrastive
from jaxcl.contrastive.train import train_and_evaluate


def main() -> None:
    config, workdir = cli.config_and_workdir()
    result = train_and_evaluate(config, workdir, **cli.run_options())
    if jax.process_index() == 0:
        for scores in result["evaluations"]:
            recall = "  ".join(f"{name} {100 * x:.1f} %" for name, x in scores.items() if "@" in name)
            print(f"step {scores['step']}: {recall}")


def command() -> None:
    cli.run(main, takes=cli.RUN, fields=contrastive.fields())
