"""Encoders of pairs: an image tower and a text tower, to unit vectors of one space. No batch norm: a row's embedding must not
tell of the other rows of its batch (the leak against which MoCo shuffles its batches), nor depend on the number of devices."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.types import PyTree


class ImageTower(nn.Module):
    """Patches of 4 x 4, then two 3x3 convolutions of stride 2, each with LayerNorm and GELU; the positions that are left are
    flattened into a linear head, so that an image is told from its mirror image.

    Attributes:
      dim: D.
      width: channels of the patches; each convolution doubles them.
      dtype: of the computation.
    """

    dim: int
    width: int = 16
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """images `[B, H, W, C]` floats -> `[B, D]` float32, of length 1."""
        x = images.astype(self.dtype)
        for channels, kernel, stride in ((self.width, 4, 4), (2 * self.width, 3, 2), (4 * self.width, 3, 2)):
            x = nn.Conv(channels, (kernel, kernel), (stride, stride), dtype=self.dtype)(x)
            x = nn.gelu(nn.LayerNorm(dtype=self.dtype)(x))
        return unit(nn.Dense(self.dim, name="head")(x.reshape(len(x), -1).astype(jnp.float32)))


class TextTower(nn.Module):
    """The mean of the tokens' vectors, a hidden layer, a linear head: a bag of words and parts of words.

    Attributes:
      dim: D.
      vocabulary: tokens, of which 0 is padding.
      width: units.
      dtype: of the computation.
    """

    dim: int
    vocabulary: int
    width: int = 64
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens int32 `[B, L]` -> `[B, D]` float32, of length 1."""
        real = (tokens > 0)[..., None]
        vectors = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)(tokens)
        x = jnp.sum(vectors * real, 1) / jnp.maximum(jnp.sum(real, 1), 1)
        x = nn.gelu(nn.Dense(2 * self.width, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)))
        return unit(nn.Dense(self.dim, name="head")(x.astype(jnp.float32)))


def unit(x: jax.Array) -> jax.Array:
    """x `[B, D]` at length 1; the gradient at 0 is finite."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-12)


class Towers(NamedTuple):
    """Two encoders as pure functions over one pytree of parameters.

    Attributes:
      init: `(key, {"image": (H, W, C), "text": (L,)}) -> params`; without "text" there is no text tower.
      encode: `(params, kind, inputs) -> float32 [B, D]`, `kind` "image" or "text".
    """

    init: Callable[[jax.Array, dict[str, tuple[int, ...]]], PyTree]
    encode: Callable[[PyTree, str, jax.Array], jax.Array]


def make_towers(dim: int, image_width: int, text_width: int, vocabulary: int, dtype: str = "float32") -> Towers:
    """The towers; sizes have been checked."""
    modules: dict[str, nn.Module] = {
        "image": ImageTower(dim, image_width, jnp.dtype(dtype)),
        "text": TextTower(dim, vocabulary, text_width, jnp.dtype(dtype)),
    }

    def init(key: jax.Array, shapes: dict[str, tuple[int, ...]]) -> PyTree:
        dtypes = {"image": jnp.float32, "text": jnp.int32}
        keys = jax.random.split(key, len(shapes))
        return {
            kind: modules[kind].init(one, jnp.zeros((1, *shapes[kind]), dtypes[kind]))["params"]
            for kind, one in zip(sorted(shapes), keys, strict=True)
        }

    def encode(params: PyTree, kind: str, inputs: jax.Array) -> jax.Array:
        return modules[kind].apply({"params": params[kind]}, inputs)  # type: ignore[return-value]

    return Towers(init, encode)
