"""Activations as bytes: how a row of numbers is stored where it stands for an image.

A row is uint8 `[views, 1, bytes]`, as an image is: view 0 of the image as it is, the others of the image augmented. Bytes,
since a scatter into 16-bit floats would copy the whole buffer on a CPU, see `jaxcl.buffer.bits`.

    float32, float16, bfloat16    the numbers' own bits
    int8                          q = round(127 x / max |x|) of each view, behind its max |x| / 127 as float32

Where the network below the layer learns too, rows that are remembered are activations and new ones images: `Latent` tells them
apart.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

DTYPES = ("float16", "bfloat16", "int8", "float32")
LATENT = "latent"  # among a model's outputs: the activations of each row
SCALE = 4  # bytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latent:
    """Activations of some rows where others have images.

    Attributes:
      x: float32 `[n, *shape]`.
    """

    x: jax.Array


Rows = (
    jax.Array | Latent | tuple[jax.Array, Latent]
)  # as a model reads them: images, activations, or the one before the other


def joined(rows: Sequence[jax.Array | Latent]) -> Rows:
    """All of these rows, of which images come first."""
    latents = [one.x for one in rows if isinstance(one, Latent)]
    images = [one for one in rows if not isinstance(one, Latent)]
    if not latents:
        return jnp.concatenate(images)
    found = Latent(jnp.concatenate(latents))
    return (jnp.concatenate(images), found) if images else found


def row_bytes(shape: Sequence[int], dtype: str) -> int:
    """Of one view of activations of this shape."""
    return math.prod(shape) * jnp.dtype(dtype).itemsize + SCALE * (dtype == "int8")


def encode(activations: jax.Array, dtype: str) -> jax.Array:
    """Floats `[n, ...]` -> uint8 `[n, bytes]`. Numbers beyond the range of float16 become its largest."""
    flat = activations.reshape(len(activations), -1).astype(jnp.float32)
    if dtype == "int8":
        scale = jnp.max(jnp.abs(flat), axis=1, keepdims=True) / 127
        q = jnp.round(flat / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8)
        return jnp.concatenate([_bytes(scale), _bytes(q)], axis=1)
    most = float(jnp.finfo(dtype).max)
    return _bytes(jnp.clip(flat, -most, most).astype(dtype))


def decode(stored: jax.Array, shape: Sequence[int], dtype: str) -> jax.Array:
    """uint8 `[n, bytes]` -> float32 `[n, *shape]`."""
    if dtype == "int8":
        scale = lax.bitcast_convert_type(stored[:, :SCALE].reshape(-1, 1, SCALE), jnp.float32)
        flat = lax.bitcast_convert_type(stored[:, SCALE:], jnp.int8) * scale
    else:
        size = jnp.dtype(dtype).itemsize
        flat = lax.bitcast_convert_type(stored.reshape(len(stored), -1, size), jnp.dtype(dtype)).astype(jnp.float32)
    return flat.reshape(len(stored), *shape)


def _bytes(x: jax.Array) -> jax.Array:
    """Their bits, uint8 `[n, bytes]`, of numbers `[n, m]`."""
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(len(x), -1)
