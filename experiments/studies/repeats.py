"""What becomes of a reservoir when each task's data comes by several times.

    python -m experiments.studies.repeats --config=configs/split_mnist.py --config.data.source=npz:FILE --workdir=DIR
        --json=experiments/results/repeats.json [--seeds=3] [--devices=1]

Experience replay on the tasks of the config, 5 epochs each, with a reservoir, for every value of `buffer.repeats`: "all"
stores copies, "first_epoch" offers a task's rows to the buffer once, "distinct" refuses a row that is stored. Copies need a
memory that is large beside the data. Of n rows, each seen E times, C kept rows hold about (1 - 1/E) C**2 / 2n pairs of copies
while these are few. So the settings go from 200 rows of all the data to half of the data. Reports final average accuracy,
distinct ids and rows by task in the buffer.
"""

import pathlib

import numpy as np

from experiments.pages.page import Json
from experiments.studies import grid
from experiments.studies.grid import Setting
from jaxcl import cli, report
from jaxcl.buffer import REPEATS
from jaxcl.errors import UserError

EPOCHS = 5
SETTINGS = ((None, 200), (6000, 200), (6000, 1000), (1000, 500))  # training rows (None: all), capacity


def main() -> None:
    study = grid.from_flags(seeds=3, least=2)
    config = study.config
    kind, _, source = config.data.source.partition(":")
    if kind != "npz":
        raise UserError(f"config.data.source: {config.data.source!r} is not allowed here, give npz:FILE")
    found = []
    for rows, capacity in SETTINGS:
        file = source if rows is None else first_rows(source, rows, study.workdir)
        shared = {"strategy": "er", "epochs": EPOCHS, "data.source": f"npz:{file}"}
        shared |= {"buffer.policy": "reservoir", "buffer.capacity": capacity}
        name = rows or "all"
        each = [Setting(f"{name}_{capacity}/{x}", {**shared, "buffer.repeats": x}, {}) for x in REPEATS]
        options = dict(zip(REPEATS, study.records(each, summary, said), strict=True))
        found.append({"training_rows": name, "capacity": capacity, "options": options})
    if cli.JSON.value:
        sizes = {"batch_size": config.batch_size, "representatives": config.buffer.representatives}
        about = {"name": config.name, "epochs": EPOCHS, **sizes, "policy": "reservoir"}
        grid.write(cli.JSON.value, {**about, "settings": found})


def first_rows(source: str, rows: int, workdir: pathlib.Path) -> pathlib.Path:
    """The data set with its first training rows alone, as a file in the workdir."""
    target = workdir / f"first_{rows}.npz"
    if not target.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        with np.load(source) as arrays:
            np.savez(target, **{name: x[:rows] if name.endswith("_train") else x for name, x in arrays.items()})
    return target


def summary(runs: list[Json]) -> Json:
    """One entry a run of everything reported."""
    buffers = [run["buffer"] for run in runs]
    return {
        **grid.each(runs, "seed", "average_accuracy", "forgetting", "seconds"),
        **grid.each(buffers, "rows", "distinct_ids"),
        "rows_by_task": [
            [sum(buffer["class_histogram"][k] for k in task) for task in run["tasks"]]
            for run, buffer in zip(runs, buffers, strict=True)
        ],
    }


def said(record: Json) -> str:
    accuracy, ids = report.spread(record["average_accuracy"]), np.mean(record["distinct_ids"])
    return f"accuracy {accuracy} %, distinct ids {ids:.0f} of {record['rows'][0]}"


if __name__ == "__main__":
    cli.run(main)
