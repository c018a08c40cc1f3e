"""Trains several strategies on the same tasks, prints a table and writes pictures and a page.

    python -m experiments.compare --config=configs/digits.py --workdir=DIR --strategies=from_scratch,incremental,er
        [--seeds=3] [--vmap] [--devices=8] [--config.epochs=5 ...]

Each run has its own folder, DIR/STRATEGY/SEED; those that are finished are not run again, an unfinished one is continued.
--vmap trains the seeds of a strategy together, as one program: see jaxcl/search/seeds.py.
"""

import pathlib
from typing import Any

import jax
from absl import flags

from experiments import cli
from jaxcl import report
from jaxcl.search.seeds import check_together, train_seeds
from jaxcl.strategies import make_strategy

STRATEGIES = flags.DEFINE_list("strategies", ["from_scratch", "incremental", "er"], "strategies to compare")
VMAP = flags.DEFINE_bool("vmap", False, "train the seeds of a strategy together, as one program")


def main() -> None:
    config, workdir = cli.required(cli.CONFIG), pathlib.Path(cli.required(cli.WORKDIR))
    count = cli.seeds(default=1)
    runs = []
    for strategy in STRATEGIES.value:
        make_strategy(strategy)
        one = config.copy_and_resolve_references()
        one.strategy = strategy
        if VMAP.value:
            check_together(one)
        seeds = range(config.seed, config.seed + count)
        runs.append((one, {seed: workdir / strategy / f"seed_{seed}" for seed in seeds}))
    options: Any = {"overwrite": cli.OVERWRITE.value, "stall_seconds": cli.STALL.value}
    for one, folders in runs:
        train_seeds(one, folders, together=VMAP.value, **options)
    if jax.process_index() > 0:
        return
    found = report.load_runs([folder for _, folders in runs for folder in folders.values()])
    print(report.table(found))
    print(f"pictures and page: {report.write_report(found, workdir)}")


if __name__ == "__main__":
    cli.run(main)
