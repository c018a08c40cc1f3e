"""The configuration of a contrastive run: every field with its default, and the checks that need no data."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxcl.contrastive.step import NEGATIVES, PAIRS
from jaxcl.contrastive.storage import STORAGES
from jaxcl.errors import UserError
from jaxcl.training import config as training

BANKED = ("fifo", "full_bank", "momentum")
Rule = tuple[Callable[[Any], bool], str]


def default_config() -> ConfigDict:
    """All fields of a run; sizes are global, as in `jaxcl.training.config`."""
    shared = training.default_config()
    optimizer = shared.optimizer.to_dict() | {"name": "adamw", "learning_rate": 1e-3, "schedule": "cosine"}
    return ConfigDict(
        {
            "name": "pairs",  # a title for reports
            "seed": 0,  # of weights, order of rows, augmentation, draws
            "negatives": "gathered",  # in_batch | gathered | fifo | full_bank | momentum
            "batch_size": 64,  # pairs a step
            "epochs": 20,
            "passes": 1,  # optimiser steps on each batch
            "dim": 64,  # of the embeddings
            "temperature": 0.07,  # the first; it is learned
            "same_side": False,  # the other rows of an anchor's own side are negatives too: SimCLR
            "momentum": 0.999,  # of negatives = momentum: the key encoders' moving average
            "log_every": 50,  # steps between lines in metrics.jsonl
            "bank": {
                "capacity": 1024,  # of fifo and momentum: rows of the union of all devices
                "drawn": 256,  # of full_bank: K rows of the bank, without replacement, are a step's negatives; 0: all
                "start": 0.0,  # the epoch from which its rows are negatives; XBM warms up (Wang et al. 2020)
                "proximal": 0.0,  # of full_bank: lambda of lambda * |v_i - stored v_i|^2
                "storage": "float32",  # float32 | bfloat16 | int8
                "chunk": 8192,  # rows of a device that are scored at a time
            },
            "data": {
                "source": "digits",  # emoji:FILE | digits | npz:FILE | tfds:NAME (class names as text) | tfds:coco_captions
                "data_dir": config_dict.placeholder(str),
                "image_size": config_dict.placeholder(int),  # of TFDS: cut images to this side
                "pairs": "captions",  # captions | views (of one image) | styles (emoji: two drawings of one thing)
                "held_out": 0.2,  # share of the pairs, of sources without a test split
                "split_seed": 0,
                "length": 48,  # tokens of a text
                "vocabulary": 4096,  # buckets that words and parts of words are hashed to
                "augment": (),  # crop, flip: on device
                "mean": config_dict.placeholder(tuple),
                "std": config_dict.placeholder(tuple),
                "threads": 2,
            },
            "model": {"image_width": 16, "text_width": 64, "dtype": "float32"},
            "optimizer": optimizer,
            "eval": {
                "batch_size": 256,
                "rounds": 1,
                "staleness_rows": 4096,
            },  # evaluations, evenly spread over the epochs
            "checkpoint": shared.checkpoint.to_dict(),
        }
    )


def _one_of(*names: str) -> Rule:
    return (lambda x: x in names), "choose one of " + ", ".join(names)


POSITIVE: Rule = (lambda x: x > 0), "give a positive number"
NOT_NEGATIVE: Rule = (lambda x: x >= 0), "give 0 or more"
RULES: dict[str, Rule] = {
    "negatives": _one_of(*NEGATIVES),
    "data.pairs": _one_of(*PAIRS),
    "bank.storage": _one_of(*STORAGES),
    "model.dtype": _one_of("float32", "bfloat16"),
    "optimizer.name": _one_of("sgd", "adamw"),
    "optimizer.schedule": _one_of("constant", "cosine"),
    "momentum": ((lambda x: 0 <= x < 1), "give a number from 0 to less than 1"),
    "data.held_out": ((lambda x: 0 < x < 1), "give a share above 0 and below 1"),
    "data.vocabulary": ((lambda x: x > 1), "give at least 2"),
    "seed": NOT_NEGATIVE,
    "bank.drawn": NOT_NEGATIVE,
    "bank.proximal": NOT_NEGATIVE,
    "bank.start": NOT_NEGATIVE,
    "checkpoint.every_steps": NOT_NEGATIVE,
    "checkpoint.every_seconds": NOT_NEGATIVE,
    "optimizer.warmup_epochs": NOT_NEGATIVE,
    **dict.fromkeys(("batch_size", "epochs", "passes", "dim", "temperature", "log_every"), POSITIVE),
    **dict.fromkeys(("bank.capacity", "bank.chunk", "data.length", "data.threads"), POSITIVE),
    **dict.fromkeys(("model.image_width", "model.text_width", "optimizer.learning_rate"), POSITIVE),
    **dict.fromkeys(("eval.batch_size", "eval.rounds", "checkpoint.keep"), POSITIVE),
}


def check_config(config: ConfigDict, devices: int) -> None:
    """Checks what can be told without data.

    Raises:
      UserError: a field is unknown, missing or of another type, or a value is not allowed on `devices` devices.
    """
    training.check_fields(config, default_config(), "config")
    flat = dict(_flat(config))
    for field, (ok, allowed) in RULES.items():
        if not ok(flat[field]):
            raise UserError(f"{field}: {flat[field]!r} is not allowed, {allowed}")
    sizes = ["batch_size", "eval.batch_size"]
    if config.negatives in ("fifo", "momentum"):
        sizes.append("bank.capacity")
        if config.bank.capacity < config.batch_size:
            raise UserError(
                f"bank.capacity: {config.bank.capacity} rows cannot hold a batch, "
                f"give at least batch_size = {config.batch_size}"
            )
    for field in sizes:
        if flat[field] % devices:
            raise UserError(
                f"{field}: {flat[field]} rows cannot be shared evenly, give a multiple of {devices} devices"
            )
    if config.bank.proximal and config.negatives != "full_bank":
        raise UserError(
            f"bank.proximal: {config.bank.proximal} needs a slot an example; give 0, or negatives = full_bank"
        )
    if config.epochs % config.eval.rounds:
        raise UserError(f"eval.rounds: {config.eval.rounds} must divide epochs = {config.epochs}")
    if config.same_side and config.data.pairs == "captions":
        raise UserError("same_side: True is not allowed with data.pairs = captions, whose sides are of two kinds")
    if 0 < config.epochs <= config.optimizer.warmup_epochs:
        raise UserError(
            f"optimizer.warmup_epochs: {config.optimizer.warmup_epochs} must be less than epochs = {config.epochs}"
        )


def _flat(config: ConfigDict, path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        found += _flat(value, f"{path}{name}.") if isinstance(value, ConfigDict) else [(path + name, value)]
    return found
