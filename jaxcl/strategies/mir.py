"""Maximally interfered retrieval: of the rows drawn, replay those whose loss the coming update would raise most.

Aljundi et al. 2019, Online continual learning with maximally interfered retrieval, section 3.1. The draw of a step
(`buffer.representatives`) is the candidate set; w' = w - lr * gradient on the new rows is the update to come, and of all
devices' candidates the `replayed` with the largest loss(w') - loss(w) take part in the step, with the new rows, as in ER.
Rows stay on the device that drew them, so the choice is that of one device; scores are by running statistics.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from jaxcl.check import POSITIVE, check, refused
from jaxcl.losses import cross_entropy
from jaxcl.mesh import AXIS
from jaxcl.strategies.base import Context, Descend, Descent, Part, Strategy
from jaxcl.types import PyTree


def mir(replayed: int = 16) -> Strategy:
    check("strategies.mir.replayed", replayed, POSITIVE)

    def fits(config: ConfigDict) -> None:
        drawn = config.buffer.representatives
        if replayed > drawn:
            raise refused("strategies.mir.replayed", replayed, f"at most buffer.representatives = {drawn}")

    def gradients(
        descend: Descend, params: PyTree, batch_stats: PyTree, parts: tuple[Part, ...], context: Context
    ) -> Descent:
        new, drawn = parts
        step = descend(params, batch_stats, (new,)).grads
        ahead = jax.tree.map(lambda w, g: w - context.learning_rate * g, params, step)

        def loss(weights: PyTree) -> jax.Array:
            logits = context.predict(weights, batch_stats, drawn.image)["logits"]
            return cross_entropy(logits, drawn.label, drawn.allowed)

        score = jnp.where(drawn.valid, loss(ahead) - loss(params), -jnp.inf)
        chosen = dataclasses.replace(drawn, valid=drawn.valid & among_largest(score, replayed))
        return descend(params, batch_stats, (new, chosen))

    return Strategy(draws=1, gradients=gradients, by_parts=True, check=fits)


def among_largest(score: jax.Array, count: int) -> jax.Array:
    """Which of this device's rows `[b]` have one of the `count` largest scores of all devices; of equals, the first."""
    everyone = lax.all_gather(score, AXIS, tiled=True)
    order = jnp.argsort(-everyone, stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
    return lax.dynamic_slice_in_dim(rank, lax.axis_index(AXIS) * len(score), len(score)) < count
