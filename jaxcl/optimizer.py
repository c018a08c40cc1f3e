"""Optimisers and learning-rate schedules from Optax, in units of epochs within a task."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxcl.types import Number, PyTree


def numbers_of(config: ConfigDict) -> dict[str, float]:
    """The numbers that optimiser and schedule use, as float64 rounds them; what the config leaves out is left out."""
    found = {"learning_rate": config.learning_rate}
    if config.warmup_epochs:  # what the warm-up rises through
        found["warmup_span"] = config.warmup_from * config.learning_rate - config.learning_rate
    found |= {name: config[name] for name in ("weight_decay", "momentum") if config[name]}
    return found if config.clip_norm is None else found | {"clip_norm": config.clip_norm}


def make_optimizer(
    config: ConfigDict,
    numbers: Mapping[str, Number] | None = None,
    norm: Callable[[PyTree], jax.Array] | None = None,
) -> optax.GradientTransformation:
    """Gradients to the direction of descent, before the learning rate is applied.

    SGD's weight decay enters the gradient before the momentum, as in PyTorch; AdamW's is decoupled.

    Args:
      numbers: see `numbers_of`; traced, they take the place of those of the config.
      norm: of all gradients, where a device has parts of them alone.
    """
    n = numbers_of(config) if numbers is None else numbers
    clip = _clip(n["clip_norm"], norm) if "clip_norm" in n else optax.identity()
    decay = optax.add_decayed_weights(n["weight_decay"]) if "weight_decay" in n else optax.identity()
    if config.name == "adamw":
        return optax.chain(clip, optax.scale_by_adam(), decay)
    momentum = optax.trace(n["momentum"], config.nesterov) if "momentum" in n else optax.identity()
    return optax.chain(clip, decay, momentum)


def _clip(most: Number, norm: Callable[[PyTree], jax.Array] | None) -> optax.GradientTransformation:
    """Gradients scaled down to the norm `most`; without a `norm` of parts they are whole."""
    if norm is None:
        return optax.clip_by_global_norm(most)  # type: ignore[arg-type]

    def scaled(grads: PyTree, params: PyTree = None) -> PyTree:
        del params
        found = norm(grads)
        return jax.tree.map(lambda g: jnp.where(found < most, g, g / found * most), grads)

    return optax.stateless(scaled)


def make_schedule(
    config: ConfigDict, epochs: int, numbers: Mapping[str, Number] | None = None
) -> Callable[[jax.Array], jax.Array]:
    """Learning rate as a function of the epoch within a task (float, 0 at its first step): every task begins it anew.

    `numbers`: see `make_optimizer`.
    """
    n = numbers_of(config) if numbers is None else numbers
    peak: Any = n["learning_rate"]
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(epochs - config.warmup_epochs, 1e-6))
    elif config.schedule == "steps":
        # Optax multiplies the scales up; the config's factors are all relative to the peak.
        relative, last = {}, 1.0
        for epoch, factor in zip(config.decay_epochs, config.decay_factors, strict=True):
            relative[epoch - config.warmup_epochs] = factor / last
            last = factor
        after = optax.piecewise_constant_schedule(peak, relative)
    else:
        after = optax.constant_schedule(peak)
    if not config.warmup_epochs:
        return after
    begin = config.warmup_epochs

    def warmup(epoch: jax.Array) -> jax.Array:
        return n["warmup_span"] * (1 - jnp.clip(epoch, 0, begin) / begin) + peak

    return optax.join_schedules([warmup, after], [begin])
