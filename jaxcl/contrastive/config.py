"""The configuration of a contrastive run: every field, and the checks that need no data."""

import dataclasses

from ml_collections import ConfigDict

from jaxcl.check import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    SEED,
    Rule,
    between,
    each,
    found_in,
    is_number,
    one_of,
    refused,
)
from jaxcl.contrastive.step import NEGATIVES, PAIRS, WITH_KEYS
from jaxcl.contrastive.storage import STORAGES
from jaxcl.data import AUGMENTATIONS
from jaxcl.errors import UserError
from jaxcl.fields import Field, Fields, check_fields, default_of
from jaxcl.training.config import (
    CHECKPOINT,
    IMAGES,
    LOG,
    OPTIMIZER,
    check_evenly,
    check_optimizer,
    check_writers,
)

QUEUED = ("fifo", *WITH_KEYS)
BANKED = ("full_bank", *QUEUED)
BETWEEN = Rule(lambda x: is_number(x) and 0 < x < 1, "a share above 0 and below 1")


def fields() -> Fields:
    """All fields of a run; sizes are global, as in `jaxcl.training.config`."""
    return {
        "name": Field("pairs", "a title for reports"),
        "seed": Field(0, "of weights, order of rows, augmentation, draws", SEED),
        "negatives": Field("gathered", "what an anchor is told from", one_of(NEGATIVES)),
        "batch_size": Field(64, "pairs a step", POSITIVE),
        "epochs": Field(20, "passes over the data", POSITIVE),
        "passes": Field(1, "optimiser steps on each batch", COUNT),
        "dim": Field(64, "of the embeddings", COUNT),
        "temperature": Field(0.07, "the first; it is learned", POSITIVE),
        "same_side": Field(False, "the other rows of an anchor's own side are negatives too: SimCLR"),
        "momentum": Field(0.999, "of negatives = momentum or moco: the key encoders' moving average", FRACTION),
        **LOG,
        "bank": {
            "capacity": Field(1024, "of fifo, momentum and moco: rows of the union of all devices", POSITIVE),
            "drawn": Field(
                256, "of full_bank: rows drawn without replacement as a step's negatives; 0: all", NOT_NEGATIVE
            ),
            "start": Field(
                0.0, "the epoch from which its rows are negatives: XBM's warm-up (Wang et al. 2020)", NOT_NEGATIVE
            ),
            "proximal": Field(0.0, "of full_bank: lambda of lambda * (v_i - stored v_i)^2", NOT_NEGATIVE),
            "storage": Field("float32", "of an embedding", one_of(STORAGES)),
            "chunk": Field(8192, "rows of a device that are scored at a time", POSITIVE),
        },
        "data": {
            "source": Field(
                "digits", "emoji:FILE, digits, npz:FILE, tfds:NAME (class names as text), tfds:coco_captions", PATH
            ),
            "data_dir": Field(None, "of TFDS; None: its own default", PATH, str),
            "pairs": Field(
                "captions", "views: two of one image; styles: of emoji:FILE, two drawings of one thing", one_of(PAIRS)
            ),
            "held_out": Field(0.2, "share of the pairs, of sources without a test split", BETWEEN),
            "split_seed": Field(0, "of the pairs held out", NOT_NEGATIVE),
            "length": Field(48, "tokens of a text", between(1, 2**16)),
            "vocabulary": Field(4096, "buckets that words and parts of words are hashed to", between(2, 2**28)),
            "augment": Field((), "of the images: on device", each(found_in(AUGMENTATIONS))),
            **IMAGES,
        },
        "model": {
            "image_width": Field(16, "of the images' tower", COUNT),
            "text_width": Field(64, "of the texts' tower", COUNT),
            "dtype": Field("float32", "of the computation", one_of(("float32", "bfloat16"))),
        },
        "optimizer": {
            **OPTIMIZER,
            "name": dataclasses.replace(OPTIMIZER["name"], default="adamw"),
            "learning_rate": dataclasses.replace(OPTIMIZER["learning_rate"], default=1e-3),
            "schedule": Field("cosine", "of the learning rate", one_of(("constant", "cosine"))),
        },
        "eval": {
            "batch_size": Field(256, "rows of an evaluation's step", POSITIVE),
            "rounds": Field(1, "evaluations, evenly spread over the epochs", POSITIVE),
            "staleness_rows": Field(4096, "of the bank, whose staleness an evaluation measures", NOT_NEGATIVE),
        },
        "checkpoint": CHECKPOINT,
    }


def default_config() -> ConfigDict:
    """All fields with their defaults."""
    return default_of(fields())


def check_config(config: ConfigDict, devices: int) -> None:
    """Checks what can be told without data.

    Raises:
      UserError: a field is unknown, missing or of another type, or a value is not allowed on `devices` devices.
    """
    check_fields(config, fields())
    check_writers(config)
    check_optimizer(config)
    sizes = ["batch_size", "eval.batch_size"]
    if config.negatives in QUEUED:
        sizes.append("bank.capacity")
        if config.bank.capacity < config.batch_size:
            raise refused("bank.capacity", config.bank.capacity, f"at least batch_size = {config.batch_size}")
    check_evenly(config, sizes, devices)
    if config.bank.proximal and config.negatives != "full_bank":
        raise UserError(
            f"bank.proximal: {config.bank.proximal} needs a slot an example; give 0, or negatives = full_bank"
        )
    if config.epochs % config.eval.rounds:
        raise refused("eval.rounds", config.eval.rounds, f"a divisor of epochs = {config.epochs}")
    if config.same_side and config.negatives == "moco":
        raise UserError(
            "same_side: True is not allowed with negatives = moco, whose negatives are those of the queue alone"
        )
    if config.same_side and config.data.pairs == "captions":
        raise UserError("same_side: True is not allowed with data.pairs = captions, whose sides are of two kinds")
