"""Handwritten digits (scikit-learn's 1,797 8x8 images), class-incremental, 5 tasks of 2 classes.

    python -m experiments.compare --config=configs/digits.py --workdir=runs/digits --devices=8

Expected: average accuracy 96.93 % from scratch, 19.72 % incremental, 93.86 % with rehearsal; under a minute for all three on
2 cores.
"""

from ml_collections import ConfigDict

from jaxcl.search.sweep import Sweep
from jaxcl.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.name = "digits, 5 x 2 classes"
    config.batch_size = 32
    config.epochs = 10
    config.data.source = "digits"
    config.data.tasks = 5
    config.model.name = "mlp"
    config.model.options = {"hidden": (128, 128)}
    config.loss.prior = "balanced"
    config.optimizer.learning_rate = 0.1
    config.buffer.capacity = 200
    config.buffer.representatives = 32
    config.buffer.candidates = 8
    config.log_every = 10
    return config


def get_sweep() -> Sweep:
    """python -m experiments.sweep --config=configs/digits.py --workdir=DIR --devices=8"""
    return Sweep({"optimizer.learning_rate": (0.03, 0.1, 0.3), "buffer.policy": ("class_random", "reservoir")}, seeds=2)
