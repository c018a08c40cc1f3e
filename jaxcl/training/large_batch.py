"""What a config says of large batches: its learning rate, epochs and schedule are stated for a base batch, and follow from
there.

Goyal et al. 2017, Accurate, large minibatch SGD (the rate in proportion to the batch, after a warm-up); Hoffer et al. 2017,
Train longer, generalize better (its square root, and as many updates as the small batch makes).
"""

from ml_collections import ConfigDict

from jaxcl.check import POSITIVE, one_of, refused
from jaxcl.fields import Field
from jaxcl.optimizer import BATCH_RULES, with_batch_rule

BATCH_FIELDS = {
    "batch_rule": Field(
        "none", "learning_rate is that of base_batch, and goes with batch_size or its square root", one_of(BATCH_RULES)
    ),
    "base_batch": Field(64, "new rows a step for which learning_rate, epochs and schedule are stated", POSITIVE),
    "train_longer": Field(
        False, "as many updates as steps of base_batch would make: more epochs, and a schedule as much longer"
    ),
    "noise_scale": Field(False, "whether metrics.jsonl has the gradient noise scale, see jaxcl/training/noise.py"),
}


def check_batch(config: ConfigDict, shards: int) -> None:
    """Whether the rules for large batches can be kept, with rows in so many parts.

    Raises:
      UserError: the epochs would be no whole number, or one device has no gradients to compare.
    """
    o = config.optimizer
    if o.train_longer and config.epochs * config.batch_size % o.base_batch:
        made = f"epochs * batch_size = {config.epochs * config.batch_size}"
        raise refused("optimizer.base_batch", o.base_batch, f"a divisor of {made} with train_longer")
    if o.noise_scale and shards == 1:
        raise refused("optimizer.noise_scale", True, "False on one device: it compares the gradients of several")
    if o.noise_scale and config.mesh.fsdp > 1:
        raise refused(
            "optimizer.noise_scale", True, "False with mesh.fsdp: no device has a gradient of its own rows alone"
        )


def longer(config: ConfigDict) -> float:
    """How many times the stated epochs and schedule are gone through."""
    return config.batch_size / config.optimizer.base_batch if config.optimizer.train_longer else 1


def epochs_of(config: ConfigDict) -> int:
    """Passes over a task's data."""
    return round(config.epochs * longer(config))


def optimizer_of(config: ConfigDict) -> ConfigDict:
    """`config.optimizer` with the learning rate as it applies."""
    return with_batch_rule(config.optimizer, config.batch_size)
