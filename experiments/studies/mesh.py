"""Accuracy of rehearsal by the shape of the mesh: a Vision Transformer on Split-CIFAR-10.

    python -m experiments.studies.mesh --config=configs/split_cifar10.py:cpu --config.data.source=npz:FILE --devices=8
        --workdir=DIR --json=experiments/results/mesh_split_cifar10.json [--seeds=3] [--rows=8x1x1,4x1x2]

ViT-Ti with 4 heads, which two devices can share, and patches of 8x8. Shapes with as many row shards (data times fsdp) draw the
same rows and differ by rounding; others draw other rows of the same law. FILE: the first 250
rows of each class, `experiments.studies.small_pack --train=250`.
"""

from collections.abc import Iterator

from experiments.bench.mesh import sizes_of
from experiments.pages.page import Json
from experiments.studies import grid
from experiments.studies.grid import ROWS, Fields, Setting
from jaxcl import cli

SHAPES = ("8x1x1", "4x1x2", "4x2x1", "2x2x2")  # data x fsdp x model
FIELDS: Fields = {
    "strategy": "er",
    "epochs": 4,
    "data.augment": (),
    "model.name": "vit",
    "model.options": {"size": "Ti", "patch": 8, "heads": 4},
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 5e-4,
    "optimizer.clip_norm": 1.0,
    "optimizer.momentum": 0.0,
    "optimizer.weight_decay": 0.05,
    "buffer.capacity": 256,
    "buffer.representatives": 32,
}


def settings(shapes: list[str]) -> Iterator[Setting]:
    for shape in shapes or SHAPES:
        data, fsdp, model = sizes_of(shape)
        mesh = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.model": model}
        yield Setting(shape, {**FIELDS, **mesh}, {"shape": shape, "row_shards": data * fsdp}, data * fsdp * model)


def summary(runs: list[Json]) -> Json:
    return grid.each(runs, "average_accuracy", "accuracy_matrix", "forgetting", "seconds")


def main() -> None:
    study = grid.from_flags(seeds=3)
    found = study.records(settings(ROWS.value), summary)
    if cli.JSON.value:
        grid.write(cli.JSON.value, {"name": study.config.name, "fields": dict(FIELDS), "rows": found})


if __name__ == "__main__":
    cli.run(main)
