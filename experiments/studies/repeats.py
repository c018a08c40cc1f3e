"""What becomes of a reservoir when each task's data comes by several times.

    python -m experiments.studies.repeats --config=configs/split_mnist.py --config.data.source=npz:FILE --workdir=DIR
        --json=experiments/results/repeats.json [--seeds=3] [--devices=1]

Experience replay on the tasks of the config, 5 epochs each, with a reservoir, for every value of `buffer.repeats`: "all"
stores copies, "first_epoch" offers a task's rows to the buffer once, "distinct" refuses a row that is stored. Copies need a
memory that is large beside the data: C rows kept of n, each seen E times, hold about (1 - 1/E) C**2 / 2n pairs of copies
while these are few. So the settings go from 200 rows of all the data to half of the data. Reports final average accuracy,
distinct ids and rows by task in the buffer. Finished runs in the workdir are not run again.
"""

import json
import pathlib

import numpy as np

from experiments import cli
from experiments.bench.harness import environment
from jaxcl.buffer import REPEATS
from jaxcl.errors import UserError
from jaxcl.training.loop import train_and_evaluate

EPOCHS = 5
SETTINGS = ((None, 200), (6000, 200), (6000, 1000), (1000, 500))  # training rows (None: all), capacity


def main() -> None:
    config, workdir = cli.required(cli.CONFIG), pathlib.Path(cli.required(cli.WORKDIR))
    cli.seeds(default=3, least=2)
    kind, _, source = config.data.source.partition(":")
    if kind != "npz":
        raise UserError(f"config.data.source: {config.data.source!r} is not allowed here, give npz:FILE")
    config.strategy, config.epochs, config.buffer.policy = "er", EPOCHS, "reservoir"
    settings = []
    for rows, capacity in SETTINGS:
        config.buffer.capacity = capacity
        config.data.source = f"npz:{source if rows is None else first_rows(source, rows, workdir)}"
        options = {}
        for repeats in REPEATS:
            runs = []
            for seed in range(config.seed, config.seed + cli.seeds(default=3)):
                one = config.copy_and_resolve_references()
                one.seed, one.buffer.repeats = seed, repeats
                runs.append(train_and_evaluate(one, workdir / f"{rows or 'all'}_{capacity}" / repeats / f"seed_{seed}"))
            options[repeats] = summary(runs)
            accuracy, ids = 100 * np.array(options[repeats]["average_accuracy"]), options[repeats]["distinct_ids"]
            print(
                f"{rows or 'all'} rows, {repeats:12s} accuracy {accuracy.mean():.2f} % +- {accuracy.std(ddof=1):.2f}, "
                f"distinct ids {np.mean(ids):.0f} of {capacity}"
            )
        settings.append({"training_rows": rows or "all", "capacity": capacity, "options": options})
    if cli.JSON.value:
        found = {
            "name": config.name,
            "epochs": EPOCHS,
            "batch_size": config.batch_size,
            "representatives": config.buffer.representatives,
            "policy": config.buffer.policy,
            "settings": settings,
            **environment(),
            "command": "python -m experiments.studies.repeats --config=configs/split_mnist.py --config.data.source=npz:FILE",
        }
        pathlib.Path(cli.JSON.value).write_text(json.dumps(found, indent=1) + "\n")


def first_rows(source: str, rows: int, workdir: pathlib.Path) -> pathlib.Path:
    """The data set with its first training rows alone, as a file in the workdir."""
    target = workdir / f"first_{rows}.npz"
    if not target.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        with np.load(source) as arrays:
            np.savez(target, **{name: x[:rows] if name.endswith("_train") else x for name, x in arrays.items()})
    return target


def summary(runs: list[dict]) -> dict[str, list]:
    """One entry a run of everything reported."""
    histograms = [run["buffer"]["class_histogram"] for run in runs]
    return {
        "seed": [run["seed"] for run in runs],
        "average_accuracy": [run["average_accuracy"] for run in runs],
        "forgetting": [run["forgetting"] for run in runs],
        "rows": [run["buffer"]["rows"] for run in runs],
        "distinct_ids": [run["buffer"]["distinct_ids"] for run in runs],
        "rows_by_task": [
            [sum(histogram[k] for k in task) for task in run["tasks"]]
            for run, histogram in zip(runs, histograms, strict=True)
        ],
        "seconds": [run["seconds"] for run in runs],
    }


if __name__ == "__main__":
    cli.run(main)
