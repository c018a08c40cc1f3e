"""`flip`: left and right mirrored, with probability 1/2."""

import jax
import jax.numpy as jnp


def flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """image `[H, W, C]` -> the same shape."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)
