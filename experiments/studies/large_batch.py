"""How large a batch may be, with and without rehearsal: batches of 64 to 4,096 by rule, optimiser, ghost group and schedule.

    python -m experiments.studies.large_batch --config=configs/split_mnist.py --config.data.source=npz:FILE --devices=2
        --workdir=DIR --json=experiments/results/large_batch.json [--seeds=3] [--rows=plain,linear] [--vmap]

MNIST as one task, and Split-MNIST with rehearsal, as many rows replayed as are new but 512 at most; an epoch, a perceptron with
norms. Every row states learning rate, epochs and warm-up for a batch of 64 and follows its rule from there: equal epochs, but
for the rows that train longer. The gradient noise scale, measured at the batch of 64 on two devices or more with a norm in
which rows do not meet, tells of the useful batch. FILE is best cut down by
`experiments.studies.small_pack --train=2560 --test=500`.
"""

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from experiments.pages.page import Json
from experiments.studies import grid
from experiments.studies.grid import ROWS, Grid, Setting
from jaxcl import cli
from jaxcl.check import check, one_of
from jaxcl.search.seeds import train_seeds
from jaxcl.training.noise import noise_scale

BASE, BATCHES, EPOCHS = 64, (512, 4096), 1
STREAMS: dict[str, Json] = {
    "mnist": {"strategy": "joint"},
    "split_mnist": {"strategy": "er", "loss.prior": "balanced", "buffer.capacity": 1000, "buffer.candidates": 16},
}
GHOST = {"model.options": {"hidden": (100, 100), "norm": "ghost", "norm_options": {"rows": BASE}}}
LAYER = {"model.options": {"hidden": (100, 100), "norm": "layer"}, "optimizer.noise_scale": True}
LAMB = {"optimizer.name": "lamb", "optimizer.learning_rate": 0.01, "optimizer.momentum": 0.0}
LARS = {"optimizer.name": "lars", "optimizer.learning_rate": 10.0, "optimizer.momentum": 0.9}
RULES: dict[str, Json] = {
    "plain": {},
    "linear": {"optimizer.batch_rule": "linear"},
    "linear, no momentum": {"optimizer.batch_rule": "linear", "optimizer.momentum": 0.0},
    "sqrt": {"optimizer.batch_rule": "sqrt"},
    "sqrt, ghost": {"optimizer.batch_rule": "sqrt", **GHOST},
    "linear, ghost": {"optimizer.batch_rule": "linear", **GHOST},
    "sqrt, longer": {"optimizer.batch_rule": "sqrt", "optimizer.train_longer": True},
    "sqrt, ghost, longer": {"optimizer.batch_rule": "sqrt", "optimizer.train_longer": True, **GHOST},
    "sqrt, longer, no momentum": {
        "optimizer.batch_rule": "sqrt",
        "optimizer.train_longer": True,
        "optimizer.momentum": 0.0,
    },
    "lars, sqrt": {"optimizer.batch_rule": "sqrt", **LARS},
    "lamb, sqrt": {"optimizer.batch_rule": "sqrt", **LAMB},
}


def shared() -> Json:
    return {
        "epochs": EPOCHS,
        "log_every": 1,
        "eval.batch_size": 1000,
        "model.name": "mlp_norm",
        "model.options": {"hidden": (100, 100), "norm": "sync"},
        "optimizer.learning_rate": 0.05,
        "optimizer.momentum": 0.9,
        "optimizer.base_batch": BASE,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_epochs": 0.25,
    }


def settings(rows: list[str], devices: int) -> Iterator[Setting]:
    """Of each stream the batch of 64, also for its noise scale, then every rule, default all, with every larger batch."""
    for name in rows:
        check("--rows", name, one_of(RULES))
    for stream, own in STREAMS.items():
        cases: list[tuple[str, int, Json]] = [("small batch", BASE, {})]
        cases += [("small batch, layer norm", BASE, LAYER)] if devices > 1 else []
        cases += [(name, batch, RULES[name]) for name in rows or RULES for batch in BATCHES]
        for name, batch, fields in cases:
            sizes: dict[str, Any] = {"batch_size": batch}
            if own["strategy"] == "er":
                sizes |= {"buffer.representatives": min(batch, 512)}  # a draw holds no row twice, and the memory 1,000
            label = {"stream": stream, "row": name, "batch_size": batch}
            yield Setting(f"{stream}/{name}/{batch}", shared() | own | sizes | fields, label)


def summary(study: Grid, setting: Setting, runs: list[Json]) -> Json:
    found = grid.each(runs, "average_accuracy", "seconds")
    if setting.fields.get("optimizer.noise_scale"):
        found["noise_scale"] = [noise_of(study.workdir / setting.place / f"seed_{run['seed']}") for run in runs]
    return found


def noise_of(folder: pathlib.Path) -> float:
    """Of all steps of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    return noise_scale([x["gradient_square"] for x in steps], [x["gradient_noise"] for x in steps])


def main() -> None:
    more: Json = {"train": train_seeds, "options": {"together": True}} if cli.VMAP.value else {}
    study = grid.from_flags(seeds=3, **more)
    found = []
    for one in settings(ROWS.value, len(study.devices)):
        found += study.records([one], functools.partial(summary, study, one))
    if cli.JSON.value:
        grid.write(cli.JSON.value, {"name": study.config.name, "base_batch": BASE, "epochs": EPOCHS, "rows": found})


if __name__ == "__main__":
    cli.run(main)
