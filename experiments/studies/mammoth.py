"""A config in the words of the program that runs Mammoth's own code."""

import os

from ml_collections import ConfigDict

from experiments.pages.page import Json
from jaxcl import data
from jaxcl.check import refused
from jaxcl.errors import UserError


def mammoth_protocol(config: ConfigDict) -> Json:
    """A row's config in the words of `experiments/bench/peers/mammoth_accuracy.py`."""
    kind, _, file = config.data.source.partition(":")
    if kind != "npz":
        raise UserError(f"--source: {config.data.source} is not allowed with --mammoth, give npz:FILE")
    if config.data.scenario not in ("class", "permuted"):
        raise refused("data.scenario", config.data.scenario, "class or permuted with --mammoth")
    train, test = data.open_source(config.data.source)
    scenario, _, _ = data.make_scenario(train, test, config.data.scenario, config.data.tasks)
    return {
        "data": os.path.abspath(file),
        "strategy": config.strategy,
        "options": dict(config.strategies.get(config.strategy, {})),
        "capacity": config.buffer.capacity,
        "replayed": config.buffer.representatives,
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "learning_rate": config.optimizer.learning_rate,
        "momentum": config.optimizer.momentum,
        "model": {"name": config.model.name, **config.model.options},
        "mean": config.data.mean,
        "std": config.data.std,
        "tasks": [list(task.classes) for task in scenario.tasks],
        "permuted": config.data.scenario == "permuted",
    }
