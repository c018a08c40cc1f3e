"""Feature distillation: the new model keeps the old one's features of the new data; needs no memory of rows.

The less-forget constraint of Jung et al. 2016 (Less-forgetting learning in deep neural networks), equation 4. From the
second task on: mean CE + strength * mean over rows of ||features - old features||^2.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxcl.strategies.base import Context, Part, Share, Strategy, cross_entropy, mean
from jaxcl.strategies.lwf import answers, keep_model, snapshot
from jaxcl.types import Number, PyTree


def feature_distillation(strength: Number = 0.1) -> Strategy:
    def loss(params: PyTree, parts: Sequence[Part], context: Context) -> Share:
        (new,) = parts
        old = answers(context, context.state, new.image)["features"]
        distance = jnp.sum(jnp.square(new.features - old), axis=1)
        penalty = jnp.where(context.task > 0, strength * mean(distance, new.valid), 0.0)
        return Share(mean(cross_entropy(new), new.valid) + penalty)

    return Strategy(loss=loss, init=snapshot, end_task=keep_model)
