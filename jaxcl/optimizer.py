"""Optimisers and learning-rate schedules from Optax, in units of epochs within a task."""

from collections.abc import Callable

import jax
import optax
from ml_collections import ConfigDict


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Gradients to the direction of descent, before the learning rate is applied.

    SGD's weight decay enters the gradient before the momentum, as in PyTorch; AdamW's is decoupled.
    """
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    decay = optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity()
    if config.name == "adamw":
        return optax.chain(clip, optax.scale_by_adam(), decay)
    momentum = optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity()
    return optax.chain(clip, decay, momentum)


def make_schedule(config: ConfigDict, epochs: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate as a function of the epoch within a task (float, 0 at its first step): every task begins it anew."""
    peak = config.learning_rate
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
    warmup = optax.linear_schedule(config.warmup_from * peak, peak, config.warmup_epochs)
    return optax.join_schedules([warmup, after], [config.warmup_epochs])
