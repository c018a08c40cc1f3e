"""Trains several strategies on the same tasks, prints a table and writes pictures and a page.

    jaxcl compare --config=digits --workdir=DIR --strategies=from_scratch,incremental,er --devices=8
    jaxcl compare --config=digits --workdir=DIR --strategies=er,der,agem --seeds=3 --vmap
    jaxcl compare --config=digits --workdir=DIR --config.epochs=5 --config.buffer.capacity=400

Each run has its own folder, DIR/STRATEGY/SEED; those that are finished are not run again, an unfinished one is continued.
Files of the report's names that are not of an earlier one are refused.
--vmap trains the seeds of a strategy together, as one program: see jaxcl/search/seeds.py.
"""

import jax
from absl import flags

from jaxcl import cli, report
from jaxcl.check import Rule, check
from jaxcl.registry import short
from jaxcl.runs.progress import Runs
from jaxcl.search.seeds import check_folders, check_seeds, train_seeds
from jaxcl.training.build import build

STRATEGIES = flags.DEFINE_list("strategies", ["from_scratch", "incremental", "er"], "strategies to compare")


def main() -> None:
    config, workdir = cli.config_and_workdir()
    count, names = cli.seeds(default=1), STRATEGIES.value
    check("--strategies", names, Rule(lambda x: x and len({short(name) for name in x}) == len(x), "each strategy once"))
    report.check_out(workdir)
    runs = []
    for strategy in names:
        one = config.copy_and_resolve_references()
        with one.unlocked():  # a config of another kind is refused by the check
            one.strategy = strategy
        seeds = range(config.seed, config.seed + count)
        check_seeds(one, seeds, cli.VMAP.value, len(jax.devices()))
        runs.append((one, {seed: workdir / short(strategy) / f"seed_{seed}" for seed in seeds}))
    for one, folders in runs:  # what data and folders tell also comes before the first run
        build(one)
        check_folders(one, folders, cli.OVERWRITE.value)
    progress = Runs(len(names) * count)
    for one, folders in runs:
        train_seeds(one, folders, together=cli.VMAP.value, progress=progress, **cli.run_options())
    if jax.process_index() > 0:
        return
    found = report.load_runs([folder for _, folders in runs for folder in folders.values()])
    print(report.table(found))
    print(f"pictures and page: {report.write_report(found, workdir)}")


def command() -> None:
    cli.run(main, takes=(STRATEGIES, cli.SEEDS, cli.VMAP, *cli.RUN))
