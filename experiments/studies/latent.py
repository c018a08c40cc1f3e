"""What a small memory can do when features are good: a pretrained network that remembers images, activations or sums.

    python -m experiments.studies.small_pack --from=npz:FILE --train=100 --test=50 --out=cifar10_small.npz
    python -m experiments.studies.small_pack --from=npz:FILE --train=10 --test=5 --every=2 --out=tinyimagenet_small.npz
    python -m experiments.studies.latent --config=configs/pretrained.py:cifar10 --config.data.source=npz:cifar10_small.npz \\
        --workdir=DIR --json=experiments/results/latent_cifar10.json [--seeds=3] [--rows=joint,ranpac]

    joint           fine-tuning on all tasks at once, the bound
    er              fine-tuning with images remembered
    latent          replay of the activations of block_14 as int8: all below stays
    slow            the same, and all below learns from new rows at a hundredth of the rate
    features        replay of the features: the head alone is trained
    simplecil       a mean of the features a class (the nearest class mean, by cosines)
    ranpac          ridge regression on random features
    sharp           two sparse hidden layers behind the features; the classes of the task before alone are remembered
    slca            a slow backbone, class Gaussians, the head aligned on draws from them

er, latent, slow, features and sharp come with 1 % and with 10 % of the bytes of the training images; of all but er the nearest
mean of the rows that are remembered is told too. Reported are the final average accuracy, its part of joint's, bytes remembered
beside the network, seconds of a run and of the features, and rows a second: new rows by the time of the steps, and features by
the time that they took. Activations are computed once for all rows and seeds that share them.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments.pages.page import Json
from experiments.studies import grid
from experiments.studies.grid import Fields, Setting
from jaxcl import cli, data, report
from jaxcl.check import check, one_of
from jaxcl.latent import row_bytes
from jaxcl.models import make_model, split

SHARES = (0.01, 0.1)
LAYER = flags.DEFINE_string("layer", "block_14", "whose activations the row `latent` remembers")
BOUND, NECK = "joint", (1024, 512)


def main() -> None:
    study = grid.from_flags(seeds=3)
    source = data.open_source(study.config.data.source, study.config.data.data_dir)[0]
    rows = rows_of(study.config, source, study.workdir / "features", LAYER.value)
    for name in grid.ROWS.value:
        check("--rows", name, one_of(rows))
    chosen = {name: fields for name, fields in rows.items() if not grid.ROWS.value or name in grid.ROWS.value}
    found = study.records([Setting(name, fields, {"row": name}) for name, fields in chosen.items()], summary, said)
    sizes = {"train": len(source), "bytes": image_bytes(source), "side": study.config.data.resize, "layer": LAYER.value}
    if cli.JSON.value:
        about = {"name": study.config.name, "epochs": study.config.epochs, **sizes}
        grid.write(cli.JSON.value, {**about, "rows": with_parts(found)})


def image_bytes(source: data.Source) -> int:
    """Of all images."""
    return len(source) * int(np.prod(source.image_shape))


def rows_of(config: ConfigDict, source: data.Source, cache: pathlib.Path, layer: str) -> Mapping[str, Fields]:
    """The settings by their row."""
    model = make_model(config.model.name, source.num_classes, options=config.model.options.to_dict())
    side = config.data.resize or source.image_shape[0]
    halves = {one: split(model, one, (side, side, source.image_shape[2])) for one in (layer, "features")}

    def replay(share: float, fields: Fields) -> Fields:
        at = fields.get("latent.layer")
        row = int(np.prod(source.image_shape)) if at is None else row_bytes(halves[at].shape, "int8")
        capacity = max(1, round(share * image_bytes(source) / row))
        few = {"buffer.capacity": capacity, "buffer.representatives": min(config.buffer.representatives, capacity)}
        return {"strategy": "er", **few, **fields}

    def on(layer: str) -> dict[str, Any]:
        return {"latent.layer": layer, "latent.dtype": "int8", "latent.cache": str(cache), "eval.metrics": ("nmc",)}

    slow = dict.fromkeys(halves[layer].below, 0.01)
    replays: dict[str, Fields] = {
        "er": {},
        "latent": on(layer),
        "slow": on(layer) | {"latent.cache": None, "latent.below": "slow", "optimizer.scales": slow},
        "features": on("features"),
        "sharp": {"strategy": "sharp", "model.options": {"neck": NECK}} | on("features"),
    }

    exact = {**on("features"), "latent.dtype": "float32", "eval.metrics": (), "epochs": 1}
    rows: dict[str, Fields] = {BOUND: {"strategy": "joint"}}
    for name, fields in replays.items():
        rows |= {f"{name} {100 * share:g} %": replay(share, fields) for share in SHARES}
    # Full covariances of many classes are many numbers: D * D a class.
    covariance = "full" if source.num_classes <= 10 else "diagonal"
    return rows | {
        "simplecil": {"strategy": "simplecil", **exact},
        "ranpac": {"strategy": "ranpac", **exact},
        "slca": {
            "strategy": "slca",
            "strategies.slca.covariance": covariance,
            "optimizer.scales": {"backbone": 0.01},
        },
    }


def summary(runs: list[Json]) -> Json:
    """One entry a run of everything reported."""
    phases = [run["seconds_by_phase"] for run in runs]
    return {
        **grid.each(runs, "seed", "average_accuracy", "seconds", "images_per_second"),
        "memory_bytes": [run["strategy_bytes"] + (run["buffer"] or {"bytes": 0})["bytes"] for run in runs],
        "feature_seconds": [one.get("features", 0.0) for one in phases],
        **({"latent": runs[0]["latent"]} if "latent" in runs[0] else {}),
        **(grid.each(runs, "average_nmc") if "average_nmc" in runs[0] else {}),
    }


def with_parts(records: list[Json]) -> list[Json]:
    """The records with the part of the bound's mean accuracy that each reaches, where the bound is among them."""
    bound = [np.mean(one["average_accuracy"]) for one in records if one["row"] == BOUND]
    return [
        one | ({"part_of_joint": float(np.mean(one["average_accuracy"]) / bound[0])} if bound else {})
        for one in records
    ]


def said(record: Json) -> str:
    accuracy, speed = report.spread(record["average_accuracy"]), np.median(record["images_per_second"])
    return f"accuracy {accuracy} %, {np.mean(record['memory_bytes']) / 1e3:,.0f} kB, {speed:,.0f} rows/s"


if __name__ == "__main__":
    cli.run(main)
