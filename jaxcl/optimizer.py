"""Optimisers and learning-rate schedules from Optax, in units of epochs within a task."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxcl.types import Number, PyTree

# The learning rate goes with this power of the batch. Goyal et al. 2017: 1; Krizhevsky 2014, Hoffer et al. 2017: 1/2.
BATCH_RULES = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}
Squares = Callable[[PyTree], PyTree]


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
    squares: Squares | None = None,
) -> optax.GradientTransformation:
    """Gradients to the direction of descent, before the learning rate is applied.

    SGD's weight decay enters the gradient before the momentum, as in PyTorch; AdamW's is decoupled. LARS (You et al. 2017)
    scales the gradient with its decay, LAMB (You et al. 2020) Adam's direction with its decay, to the length of each layer's
    weights, LARS times `trust`. As usual biases, and scales of norms, have neither that nor a decay.

    Args:
      numbers: see `numbers_of`; traced, they take the place of those of the config.
      squares: of each array like the parameters the sum of its squares, where a device has parts of them alone.
    """
    n = numbers_of(config) if numbers is None else numbers
    clip = _clip(n["clip_norm"], squares) if "clip_norm" in n else optax.identity()
    decay = optax.add_decayed_weights(n["weight_decay"]) if "weight_decay" in n else optax.identity()
    if config.name == "adamw":
        return optax.chain(clip, optax.scale_by_adam(), decay)
    if config.name in ("lars", "lamb"):
        decay = optax.masked(decay, layers)
    if config.name == "lamb":
        return optax.chain(clip, optax.scale_by_adam(eps=1e-6), decay, _trust(1.0, squares))
    momentum = optax.trace(n["momentum"], config.nesterov) if "momentum" in n else optax.identity()
    if config.name == "lars":
        return optax.chain(clip, decay, _trust(config.trust, squares), momentum)
    return optax.chain(clip, decay, momentum)


def layers(params: PyTree) -> PyTree:
    """Which parameters are weights of a layer, and no bias or scale."""

    def is_layer(path: Any, w: jax.Array) -> bool:
        return w.ndim > 1 and jax.tree_util.keystr(path[-1:], simple=True) != "bias"

    return jax.tree_util.tree_map_with_path(is_layer, params)


def with_batch_rule(config: ConfigDict, batch_size: int) -> ConfigDict:
    """The same with the learning rate that `batch_rule` gives to this many new rows a step."""
    power = BATCH_RULES[config.batch_rule]
    if not power:
        return config
    one = config.copy_and_resolve_references()
    one.learning_rate = config.learning_rate * (batch_size / config.base_batch) ** power
    return one


def _clip(most: Number, squares: Squares | None) -> optax.GradientTransformation:
    """Gradients scaled down to the norm `most`; `squares`: see `make_optimizer`."""
    if squares is None:
        return optax.clip_by_global_norm(most)  # type: ignore[arg-type]

    def scaled(grads: PyTree, params: PyTree = None) -> PyTree:
        del params
        found = jnp.sqrt(sum(jax.tree.leaves(squares(grads))))
        return jax.tree.map(lambda g: jnp.where(found < most, g, g / found * most), grads)

    return optax.stateless(scaled)


def _trust(coefficient: float, squares: Squares | None) -> optax.GradientTransformation:
    """The direction of each layer scaled to `coefficient` times the length of its weights; `squares`: see `make_optimizer`."""
    whole = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=coefficient), layers)
    if squares is None:
        return whole

    def scaled(is_layer: bool, direction: jax.Array, square: jax.Array, weights: jax.Array) -> jax.Array:
        moves = (square > 0) & (weights > 0)
        ratio = jnp.where(moves, coefficient * jnp.sqrt(weights / jnp.where(moves, square, 1.0)), 1.0)
        return direction * ratio if is_layer else direction

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        return jax.tree.map(scaled, layers(params), grads, squares(grads), squares(params)), state

    return optax.GradientTransformation(whole.init, update)


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
