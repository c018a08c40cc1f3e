"""Dark Experience Replay: the buffer keeps the logits of a row as they were when it arrived, and replay matches them.

Buzzega et al. 2020, Dark experience for general continual learning, equation 5. With z the logits stored:

    mean over new rows of CE + alpha * mean over replayed rows and classes of (logits - z)^2

New and replayed rows pass through the network together, so that a batch norm sees them as one batch; in Mammoth they pass one
after the other.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcl.strategies.base import Context, Outputs, Part, Share, Strategy, cross_entropy, mean
from jaxcl.types import Number, PyTree


def der(alpha: Number = 0.3) -> Strategy:
    def loss(params: PyTree, parts: Sequence[Part], context: Context) -> Share:
        new, replay = parts
        return Share(mean(cross_entropy(new), new.valid) + alpha * mean(logit_distance(replay), replay.valid))

    return Strategy(draws=1, record=with_logits, stores_outputs=True, loss=loss, weights=(1.0, 0.0))


def with_logits(image: jax.Array, outputs: Outputs) -> PyTree:
    """The image and the logits of this step's forward pass, before its update: float32 `[b, K]`."""
    return {"image": image, "logits": outputs["logits"]}


def logit_distance(part: Part) -> jax.Array:
    """Each row's mean squared distance `[b]` between its logits and those stored."""
    return jnp.mean(jnp.square(part.logits - part.record["logits"]), axis=1)
