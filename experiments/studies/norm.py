"""Accuracy of rehearsal by norm, number of devices and rows replayed.

    python -m experiments.studies.norm --stream=split_cifar10 --config=configs/split_cifar10.py:cpu --devices=8
        --config.data.source=npz:FILE --workdir=DIR --json=experiments/results/norm_split_cifar10.json [--seeds=3] [--vmap]
        [--rows=sync,ghost]
    python -m experiments.studies.norm --stream=permuted_mnist --config=configs/permuted_mnist_mammoth.py:er-500 ...

Experience replay on the tasks of the config, small: a narrow network with norms. Each norm replays `FEW` rows a step on one
device and on all of them, and as many as are new on all of them. FILE is best cut down by `experiments.studies.small_pack`.
`ada_bn` is AdaB2N with its balance and momentum alone, `ada` with the regulariser too.
"""

from collections.abc import Iterator
from typing import Any

from absl import flags

from experiments.pages.page import Json
from experiments.studies import grid
from experiments.studies.grid import ROWS, Setting
from jaxcl import cli
from jaxcl.check import check, one_of
from jaxcl.search.seeds import train_seeds

FEW = 8
NORMS: dict[str, Json] = {
    "local": {"norm": "local"},
    "ghost": {"norm": "ghost", "norm_options": {"rows": 8}},  # what local is on 8 devices
    "sync": {"norm": "sync"},
    "split": {"norm": "split"},
    "ada_bn": {"norm": "ada", "norm_options": {"kappa": 0.4}},
    "ada": {"norm": "ada", "norm_options": {"kappa": 0.4, "strength": 0.1}},
    "group": {"norm": "group", "norm_options": {"groups": 4}},
    "layer": {"norm": "layer"},
    "bcn": {"norm": "bcn", "norm_options": {"groups": 4}},
    "unmix": {"norm": "unmix"},
    "sync, batchformer": {"norm": "sync", "batchformer": 4},
}
STREAMS: dict[str, Json] = {
    "split_cifar10": {
        "model.name": "convnet",
        "model.options": {"width": 8, "fold": 2},
        "epochs": 2,
        "data.augment": (),
        "buffer.capacity": 500,
    },
    "permuted_mnist": {
        "model.name": "mlp_norm",
        "model.options": {"hidden": (64, 64)},
        "batch_size": 64,
        "epochs": 1,
        "data.tasks": 5,
        "buffer.capacity": 500,
        "buffer.candidates": 16,
        "optimizer.learning_rate": 0.1,
    },
}
STREAM = flags.DEFINE_enum("stream", "split_cifar10", list(STREAMS), "how the config is made small")


def settings(stream: str, rows: list[str], devices: int) -> Iterator[Setting]:
    """The norms called `rows`, default all, on one device and on `devices`."""
    shared = STREAMS[stream]
    for name in rows or NORMS:
        check("--rows", name, one_of(NORMS))
        for n, replayed in dict.fromkeys([(1, FEW), (devices, FEW), (devices, 64)]):
            options = {"model.options": shared["model.options"] | NORMS[name]}
            fields: dict[str, Any] = {"strategy": "er", "loss.prior": "balanced", "buffer.representatives": replayed}
            place = f"{name}/{n}_devices_{replayed}_replayed"
            yield Setting(place, shared | fields | options, {"row": name, "devices": n, "replayed": replayed}, n)


def summary(runs: list[Json]) -> Json:
    return grid.each(runs, "average_accuracy", "forgetting", "seconds")


def main() -> None:
    more: Json = {"train": train_seeds, "options": {"together": True}} if cli.VMAP.value else {}
    study = grid.from_flags(seeds=3, **more)
    found = study.records(settings(STREAM.value, ROWS.value, len(study.devices)), summary)
    if cli.JSON.value:
        about = {"name": study.config.name, "stream": STREAM.value, "batch_size": 64, "fields": STREAMS[STREAM.value]}
        grid.write(cli.JSON.value, about | {"rows": found})


if __name__ == "__main__":
    cli.run(main)
