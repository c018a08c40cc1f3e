"""ER-ACE: experience replay with an asymmetric cross-entropy.

Caccia et al. 2022, New insights on reducing abrupt representation change in online continual learning, equation 4:

    mean over new rows of CE(among the classes of the incoming batch) + mean over replayed rows of CE(among the classes seen)

New rows thus do not push down the logits of old classes; replayed rows separate all of them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl import losses
from jaxcl.mesh import AXIS
from jaxcl.strategies.base import Context, Part, Share, Strategy, mean
from jaxcl.types import PyTree


def er_ace() -> Strategy:
    def loss(params: PyTree, parts: Sequence[Part], context: Context) -> Share:
        new, replay = parts
        value = mean(_entropy(new, in_batch(new)), new.valid) + mean(_entropy(replay, context.seen), replay.valid)
        return Share(value)

    own = "classifies new rows among the classes of their batch"
    return Strategy(draws=1, loss=loss, weights=(1.0, 1.0), own_bias=own)


def in_batch(part: Part) -> jax.Array:
    """bool `[K]`: the classes of the valid rows of all devices."""
    classes = jnp.arange(part.logits.shape[1])
    here = jnp.any((part.label[:, None] == classes) & part.valid[:, None], axis=0)
    return lax.psum(here.astype(jnp.float32), AXIS) > 0  # of the type of the other sums, so that XLA joins them


def _entropy(part: Part, classes: jax.Array) -> jax.Array:
    return losses.cross_entropy(part.logits, part.label, classes if part.allowed is None else classes & part.allowed)
