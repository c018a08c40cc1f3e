"""Negatives of the batch, of all devices or of a memory bank: what each gives, what it costs, and how old its rows are.

    python -m experiments.studies.memory_bank --config=configs/memory_bank_emoji.py --config.data.source=emoji:FILE
        --workdir=DIR --devices=8 --json=experiments/results/memory_bank.json [--seeds=3]
        [--parts=accuracy,staleness,storage,cost]

Parts, each kept in the file beside the others:
  accuracy: retrieval on held-out pairs. N = 1, 2, 4, 8 devices of the config's batch each, which gather, for as many epochs and
    for as many steps as one device; one device with as many negatives from a bank of each kind, and with more.
  staleness: cosine between stored and fresh embedding by age, of the queue with and without momentum encoder and of the full
    bank with and without proximal term; images without augmentation, so that age alone tells.
  storage: what bfloat16 and int8 cost.
  pairs: styles and views of the emoji instead of captions.
  cost: time a step and bytes on a device, every kind in turn; see experiments/bench/bank.py.
  scale: 3,264,868 rows of 768 numbers, and the law of growth; 5 GB, so only where asked for.
experiments.pages writes the tables and pictures of docs/memory_bank.md from the file.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments.bench import bank as bank_cost
from experiments.bench.harness import environment
from experiments.pages.page import Json, as_json
from experiments.studies import grid
from experiments.studies.grid import Fields, Grid, Setting
from jaxcl import cli, report
from jaxcl.check import check, one_of, refused
from jaxcl.contrastive import storage
from jaxcl.contrastive.train import train_and_evaluate
from jaxcl.search.seeds import with_seed
from jaxcl.search.sweep import folder_name

PARTS = flags.DEFINE_list("parts", ["accuracy", "staleness", "storage", "pairs", "cost"], "what to measure")
DEVICES = (1, 2, 4, 8)
MORE = 1024  # rows of the largest bank
MOMENTA = (0.9, 0.99, 0.999)
LAMBDAS = (0.0, 1.0, 10.0)
Changes = tuple[int, Fields]  # devices, changes of the config


def accuracy_settings(config: ConfigDict) -> Iterator[Changes]:
    b, epochs = config.batch_size, config.epochs
    for n in DEVICES:
        yield n, {"negatives": "gathered", "batch_size": n * b}
        if n > 1:
            yield n, {"negatives": "gathered", "batch_size": n * b, "epochs": n * epochs}
    middle = (DEVICES[-1] - 1) * b
    for rows in (*((n - 1) * b for n in DEVICES[1:]), MORE):
        yield 1, {"negatives": "fifo", "bank.capacity": rows}
        for m in MOMENTA if rows == middle else (config.momentum,):
            yield 1, {"negatives": "momentum", "bank.capacity": rows, "momentum": m}
        for weight in LAMBDAS if rows == middle else LAMBDAS[:2]:
            yield 1, {"negatives": "full_bank", "bank.drawn": rows, "bank.proximal": weight}
    for negatives in ("fifo", "momentum", "full_bank"):  # used from the first step
        yield 1, {"negatives": negatives, "bank.capacity": middle, "bank.drawn": middle, "bank.start": 0.0}
    # A stored row is also another crop of its example than the encoders see now.
    for negatives in ("in_batch", "fifo", "momentum", "full_bank"):
        yield 1, {"negatives": negatives, "bank.capacity": MORE, "bank.drawn": MORE, "data.augment": ("crop",)}
    yield 1, {"negatives": "full_bank", "bank.drawn": MORE, "bank.proximal": LAMBDAS[1], "data.augment": ("crop",)}


def storage_settings(config: ConfigDict) -> Iterator[Changes]:
    for kind in storage.STORAGES:
        rows = {"bank.capacity": 7 * config.batch_size, "bank.storage": kind}
        yield 1, {"negatives": "momentum", **rows}


def pairs_settings(config: ConfigDict) -> Iterator[Changes]:
    rows = 7 * config.batch_size
    for pairs in ("styles", "views"):
        common: Json = {"data.pairs": pairs}
        alone: Json = {}
        if pairs == "views":  # two crops of one image, SimCLR's loss where nothing is stored
            common["data.augment"], alone["same_side"] = ("crop", "flip"), True
        yield 1, common | {"negatives": "in_batch"} | alone
        yield 8, common | {"negatives": "gathered", "batch_size": 8 * config.batch_size} | alone
        for negatives in ("fifo", "momentum"):
            yield 1, common | {"negatives": negatives, "bank.capacity": rows}
        yield 1, common | {"negatives": "full_bank", "bank.drawn": rows}


def staleness_settings(config: ConfigDict) -> Iterator[Changes]:
    shared = {"eval.rounds": 4, "bank.capacity": MORE}
    yield 1, shared | {"negatives": "fifo", "bank.start": 0.0}
    yield 1, shared | {"negatives": "fifo"}
    for m in MOMENTA:
        yield 1, shared | {"negatives": "momentum", "momentum": m}
    for weight in LAMBDAS:
        yield 1, shared | {"negatives": "full_bank", "bank.drawn": 7 * config.batch_size, "bank.proximal": weight}


SETTINGS: dict[str, Callable[[ConfigDict], Iterator[Changes]]] = {
    "accuracy": accuracy_settings,
    "staleness": staleness_settings,
    "storage": storage_settings,
    "pairs": pairs_settings,
}


def setting(part: str, devices: int, changes: Fields) -> Setting:
    place = f"{part}/{devices},{folder_name(dict(changes))}"
    return Setting(place, {"checkpoint.every_seconds": 0.0, **changes}, {"devices": devices, **changes}, devices)


def train(config: ConfigDict, folders: dict[int, pathlib.Path], **options: Any) -> list[Json]:
    return [train_and_evaluate(with_seed(config, seed), folder, **options) for seed, folder in folders.items()]


def measure(study: Grid, part: str) -> list[Json]:
    """A record a setting of one part."""
    settings = [setting(part, *one) for one in SETTINGS[part](study.config)]
    found = study.records(settings, summary, lambda record: report.spread(record["recall"]["left_to_right@10"]))
    for one in found:
        if part != "staleness":
            del one["evaluations"]
        if part == "storage":
            kind = one["bank.storage"]
            one |= {"row_bytes": row_bytes(kind), "error": storage_error(kind)}
    return found


def summary(runs: list[Json]) -> Json:
    last = [run["evaluations"][-1] for run in runs]
    return {
        "negatives_of_an_anchor": negatives_of(runs[0]["config"]),
        "steps": runs[0]["steps"],
        "recall": grid.each(last, *(name for name in last[0] if "@" in name)),
        "evaluations": [{"step": e["step"], **e.get("staleness", {})} for e in runs[0]["evaluations"]],
    }


def row_bytes(kind: str) -> int:
    """Of an embedding of 768 numbers."""
    return sum(int(np.prod(x.shape, dtype=int)) * x.dtype.itemsize for x in storage.spec(kind, bank_cost.DIM).values())


def storage_error(kind: str) -> float:
    """Root mean square distance of a random unit vector of 768 numbers from what is stored of it."""
    x = np.random.default_rng(0).normal(size=(1000, bank_cost.DIM)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    lost = np.asarray(storage.decode(storage.encode(kind, jnp.asarray(x)))) - x
    return float(np.sqrt(np.mean(np.sum(lost**2, axis=1))))


def negatives_of(config: Json) -> int:
    """How many negatives an anchor has, but for those that match it by chance."""
    bank = config["bank"]
    if config["negatives"] == "moco":
        return bank["capacity"]
    stored = {"fifo": bank["capacity"], "momentum": bank["capacity"], "full_bank": bank["drawn"]}
    return config["batch_size"] * (2 if config["same_side"] else 1) - 1 + stored.get(config["negatives"], 0)


def main() -> None:
    study = grid.from_flags(seeds=3, train=train, options={"progress": False})
    once = dataclasses.replace(study, seeds=1)
    config = study.config
    parts: dict[str, Callable[[], list[Json]]] = {
        **{part: functools.partial(measure, once if part == "staleness" else study, part) for part in SETTINGS},
        "cost": functools.partial(bank_cost.measure_modes, config),
        "scale": bank_cost.measure_growth,
    }
    for part in PARTS.value:
        check("--parts", part, one_of(parts))
    if jax.device_count() < max(DEVICES):
        raise refused("--devices", jax.device_count(), f"at least {max(DEVICES)}")
    path = pathlib.Path(cli.JSON.value or study.workdir / "memory_bank.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in PARTS.value:
        found = parts[part]()
        whole = json.loads(path.read_text()) if path.exists() else {}
        about = {"name": config.name, "batch_size": config.batch_size, "epochs": config.epochs}
        about |= {"bank_start": config.bank.start, "seeds": 1 if part == "staleness" else study.seeds}
        whole[part] = {**about, "settings": found, **environment()}
        path.write_text(as_json(whole))


if __name__ == "__main__":
    cli.run(main)
