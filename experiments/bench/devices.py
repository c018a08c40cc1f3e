"""What of a config depends on the number of devices, by norm: the same task on 1, 2, 4 and 8 of them.

    python -m experiments.bench.devices --config=configs/split_cifar10.py:cpu --config.data.source=npz:FILE --devices=8
        --workdir=DIR [--numbers=1,2,4,8] [--norms=local,sync,ghost] [--ghost_rows=16] [--json=FILE]

Trains on all rows of the config as one task, once for each number of devices and each norm, and compares the weights and
the accuracy after it with those of the first number. Rows of a step, weights at the start and augmentation do not depend on
the devices, so that without a memory (--strategy=incremental, the default) what differs is the norm and rounding. With one,
draws are other samples of the same law: only with `buffer.policy=fifo` and as many representatives as capacity are they the
same rows.
"""

import pathlib
from typing import Annotated

import numpy as np

from experiments.bench import harness
from experiments.pages.page import Json
from experiments.studies import grid
from jaxcl.check import check, one_of
from jaxcl.models import NORMS
from jaxcl.runs import workdir
from jaxcl.training import weights

ALL = ("local", "ghost", "sync", "group", "layer", "bcn", "unmix", "split", "ada")


def measure(
    *,
    numbers: Annotated[tuple[int, ...], "of devices; the first is what the others are compared with"] = (1, 2, 4, 8),
    norms: Annotated[tuple[str, ...], "of the model"] = ALL,
    ghost_rows: Annotated[int, "new rows of a group of ghost"] = 16,
    groups: Annotated[int, "of channels, for group and bcn"] = 4,
    strategy: Annotated[str, "of the runs"] = "incremental",
) -> Json:
    runs, records = grid.from_flags(seeds=1), []
    for norm in norms:
        check("--norms", norm, one_of(NORMS))
        own = {"ghost": {"rows": ghost_rows}, "group": {"groups": groups}, "bcn": {"groups": groups}}.get(norm, {})
        options = runs.config.model.options.to_dict() | {"norm": norm, "norm_options": own}
        fields = {"data.tasks": 1, "strategy": strategy, "model.options": options}
        first: tuple[dict[str, np.ndarray], float] | None = None
        for n in numbers:
            place = f"{norm}/{n}_devices"
            result = runs.runs(place, fields, devices=n)[0]
            found = arrays(runs.workdir / place / f"seed_{runs.config.seed}"), result["average_accuracy"]
            first = first or found
            records.append({"norm": norm, "devices": n, **apart(found[0], first[0]), **accuracies(found[1], first[1])})
            harness.show(records[-1])
    return {"name": runs.config.name, "batch_size": runs.config.batch_size, "strategy": strategy, "norms": records}


def arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return weights.read(folder / workdir.WEIGHTS)[1]


def apart(found: dict[str, np.ndarray], first: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest differences of parameters and of running statistics."""
    names = {"parameters": "params.", "statistics": "batch_stats."}
    return {
        kind: max(
            (float(np.abs(x - first[name]).max()) for name, x in found.items() if name.startswith(prefix)), default=0.0
        )
        for kind, prefix in names.items()
    }


def accuracies(found: float, first: float) -> dict[str, float]:
    return {"accuracy": found, "accuracy_apart": abs(found - first)}


if __name__ == "__main__":
    harness.run(measure)
