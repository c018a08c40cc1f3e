"""UER: unbiased experience replay. New rows learn by the angle of the logits, replayed rows by angle and norm.

Lin et al. 2023, UER: a heuristic bias addressing approach for online continual learning. With the features f, the input of the
head, and its weights w_k and bias b_k,

    mean over new rows of CE(gamma * cos(f, w_k)) + mean over replayed rows of CE(f . w_k + b_k)

Of a logit f . w_k = |f| |w_k| cos(f, w_k) the cosine is what new classes are learnt by, and the norms help to remember the old
ones: only what is replayed sets them. The head is the model's own, its bias included, and evaluation ranks by its logits; the
cosine knows no bias. `gamma`, without which cosines in -1..1 cannot tell many classes apart, is to be chosen: the authors'
repository holds no code.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl import losses
from jaxcl.check import POSITIVE, check
from jaxcl.strategies.base import Context, Part, Share, Strategy, cross_entropy, mean
from jaxcl.types import PyTree


def uer(gamma: float = 10.0) -> Strategy:
    check("strategies.uer.gamma", gamma, POSITIVE)

    def loss(params: PyTree, parts: Sequence[Part], context: Context) -> Share:
        del context
        new, replay = parts
        angle = gamma * cosines(new.features, params["head"]["kernel"])
        learnt = losses.cross_entropy(angle, new.label, new.allowed)
        return Share(mean(learnt, new.valid) + mean(cross_entropy(replay), replay.valid))

    # The prior is that of one set of logits over all rows. Here each origin has its own, and new rows do not touch the norms.
    own = "learns new rows by other logits than replayed ones, which have no common prior"
    return Strategy(draws=1, loss=loss, weights=(1.0, 1.0), own_bias=own, head=True)


def cosines(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """Of the angles between features `[b, D]` and the columns of the kernel `[D, K]`: `[b, K]`; of a vector of nearly no length
    0, without a gradient."""
    return _unit(features, 1) @ _unit(kernel, 0)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    square = jnp.sum(jnp.square(x), axis, keepdims=True)
    there = square > 1e-12  # below, the gradient of a direction has no bound, and at 0 it is not a number
    return jnp.where(there, x * lax.rsqrt(jnp.where(there, square, 1.0)), 0.0)
