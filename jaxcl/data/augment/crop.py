"""`crop`: a window of the image's own size, anywhere in the image padded with zeros. He et al., CVPR 2016, section 4.2."""

import jax
import jax.numpy as jnp


def crop(key: jax.Array, image: jax.Array) -> jax.Array:
    """image `[H, W, C]` -> the same shape. The padding is an eighth of each side: 4 pixels of 32."""
    h, w, _ = image.shape
    pad_h, pad_w = max(1, h // 8), max(1, w // 8)
    padded = jnp.pad(image, ((pad_h, pad_h), (pad_w, pad_w), (0, 0)))
    y, x = jax.random.randint(key, (2,), 0, 2 * jnp.array([pad_h, pad_w]) + 1)
    return jax.lax.dynamic_slice(padded, (y, x, jnp.zeros_like(y)), image.shape)
