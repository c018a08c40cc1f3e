"""DyTox: a transformer that grows by one learned token and one classifier a task.

Douillard, Ramé, Couairon, Cord, DyTox: Transformers for Continual Learning with DYnamic TOken eXpansion, CVPR 2022. Patches
go through self-attention blocks with gated positional attention (GPSA; d'Ascoli et al., ConViT, ICML 2021), which begins as a
convolution; then one task-attention block, shared by all tasks, makes of each task's token an embedding of the image, and
each task's classifier names its own classes by its own embedding (the paper's "1-1" classifiers).

**How it grows.** Tokens, classifiers and divergence heads of all tasks are there from the start, as arrays with an axis of
tasks (of classes, where a classifier's columns are). Those of later tasks take no part in a loss and stay as they were drawn
until their task begins, which is when DyTox would draw them: what `jaxcl.strategies.dytox` sees to. So nothing is lost or
compiled anew at a task's beginning. It costs the task attention of all tasks from the first step on, which is little: with 10
tasks on 64 patches 3 % of the operations of the blocks before it, as keys and values of the patches serve all tokens.

Differences: without stochastic depth (0.1 in the published settings). Every token attends to the patches and to itself alone,
as when the block is run once a task.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.check import refused
from jaxcl.models._options import Size

_dense_init = nn.initializers.truncated_normal(0.02)
_EPS = 1e-5  # of the layer norms: PyTorch's


def dytox(
    *,
    dtype: jnp.dtype,
    classes: np.ndarray,
    width: Size = 384,
    depth: Size = 5,
    heads: Size = 12,
    patch: Size = 4,
    divergence: bool = True,
) -> nn.Module:
    """Options: see `DyTox`. A class that several tasks have belongs to the first, one that none has to none."""
    if width % heads:
        raise refused("model.options.heads", heads, f"a divisor of width = {width}")
    task_of_class = np.where(classes.any(axis=0), np.argmax(classes, axis=0), -1)
    return DyTox(tuple(task_of_class.tolist()), width, depth, heads, patch, divergence, dtype)


class GatedAttention(nn.Module):
    """Self-attention with a gate for each head between content and position (ConViT, section 3). At first a head looks at one
    place of a window around its patch, sigmoid(1) = 73 % by position."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, side: tuple[int, int]) -> jax.Array:
        """x `[B, P, D]`, the patches of a grid of `side` -> `[B, P, D]`."""
        width = x.shape[-1]

        def dense(units: int, name: str, kernel_init: Any = _dense_init, bias: bool = False) -> nn.Dense:
            return nn.Dense(units, use_bias=bias, kernel_init=kernel_init, dtype=self.dtype, name=name)

        split = (*x.shape[:2], self.heads, width // self.heads)
        query, key = (y.reshape(split) for y in jnp.split(dense(2 * width, "qk")(x), 2, axis=-1))
        value = dense(width, "v", lambda key, shape, dtype=jnp.float32: jnp.eye(shape[0], dtype=dtype))(x).reshape(
            split
        )
        content = jnp.einsum("bphd,bqhd->bhpq", query, key).astype(jnp.float32) / np.sqrt(width // self.heads)
        position = nn.Dense(self.heads, kernel_init=_local, name="pos_proj")(relative_positions(side))
        gate = nn.sigmoid(self.param("gate", nn.initializers.ones, (self.heads,)))[:, None, None]
        attention = (1 - gate) * nn.softmax(content) + gate * nn.softmax(position.transpose(2, 0, 1))
        attention /= attention.sum(axis=-1, keepdims=True)
        mixed = jnp.einsum("bhpq,bqhd->bphd", attention.astype(self.dtype), value).reshape(x.shape)
        return dense(width, "proj", bias=True)(mixed)


def relative_positions(side: tuple[int, int]) -> np.ndarray:
    """float32 `[P, P, 3]`: for patch p and q of a grid, row by row, how far q is to the right, below, and both squared."""
    y, x = (axis.ravel() for axis in np.mgrid[: side[0], : side[1]])
    dx, dy = x[None] - x[:, None], y[None] - y[:, None]
    return np.stack([dx, dy, dx**2 + dy**2], axis=-1).astype(np.float32)


def _local(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Positional weights [3, heads] that make the heads the places of a convolution's window: 12 heads hold 3 x 3, and three
    that begin anywhere."""
    heads = shape[1]
    window = int(heads**0.5)
    row, column = np.mgrid[:window, :window].reshape(2, -1) - (window - 1) / 2
    weights = np.stack([2 * column, 2 * row, -np.ones(window**2)])
    return jnp.concatenate([jnp.asarray(weights, dtype), _dense_init(key, (3, heads - window**2), dtype)], axis=1)


class Perceptron(nn.Module):
    """Two layers, four times as wide in between."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = nn.Dense(4 * x.shape[-1], kernel_init=_dense_init, dtype=self.dtype)(x)
        return nn.Dense(x.shape[-1], kernel_init=_dense_init, dtype=self.dtype)(nn.gelu(wide, approximate=False))


class Block(nn.Module):
    """Gated self-attention and a perceptron, each behind a norm and beside a short cut."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, side: tuple[int, int]) -> jax.Array:
        x = x + GatedAttention(self.heads, self.dtype, name="attention")(nn.LayerNorm(_EPS)(x), side)
        return x + Perceptron(self.dtype)(nn.LayerNorm(_EPS)(x))


class TaskAttention(nn.Module):
    """Class attention (Touvron et al. 2021) of every task's token to itself and the patches, then a perceptron."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, patches: jax.Array) -> jax.Array:
        """tokens `[T, D]`, patches `[B, P, D]` -> an embedding for each task, `[B, T, D]`."""
        width, scale = tokens.shape[-1], np.sqrt(tokens.shape[-1] // self.heads)
        norm = nn.LayerNorm(_EPS)
        own, others = norm(tokens), norm(patches)

        def heads_of(name: str) -> tuple[jax.Array, jax.Array]:
            """Of the tokens `[T, h, d]` and of the patches `[B, P, h, d]`, by the same weights."""
            dense = nn.Dense(width, use_bias=False, kernel_init=_dense_init, dtype=self.dtype, name=name)
            split = (self.heads, width // self.heads)
            return dense(own).reshape(-1, *split), dense(others).reshape(*patches.shape[:2], *split)

        (query, _), (own_key, key), (own_value, value) = heads_of("q"), heads_of("k"), heads_of("v")
        to_patches = jnp.einsum("thd,bphd->bthp", query, key)
        to_self = jnp.broadcast_to(jnp.einsum("thd,thd->th", query, own_key)[..., None], (*to_patches.shape[:3], 1))
        scores = jnp.concatenate([to_self, to_patches], axis=-1).astype(jnp.float32) / scale
        attention = nn.softmax(scores).astype(self.dtype)
        mixed = attention[..., :1] * own_value + jnp.einsum("bthp,bphd->bthd", attention[..., 1:], value)
        mixed = mixed.reshape(len(patches), *tokens.shape)
        x = tokens + nn.Dense(width, kernel_init=_dense_init, dtype=self.dtype, name="proj")(mixed)
        return x + Perceptron(self.dtype)(nn.LayerNorm(_EPS)(x))


class Heads(nn.Module):
    """A norm for each task, and a linear layer for each output.

    Attributes:
      task_of: of each output, the task by whose embedding it is told; -1: any.
    """

    task_of: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x `[B, T, D]` -> [B, outputs] float32."""
        _, tasks, width = x.shape
        scale = self.param("scale", nn.initializers.ones, (tasks, width))
        shift = self.param("shift", nn.initializers.zeros, (tasks, width))

        def uniform(key: jax.Array, shape: Sequence[int]) -> jax.Array:
            """PyTorch's default of a linear layer, weights and biases alike."""
            return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / np.sqrt(width)

        kernel = self.param("kernel", uniform, (width, len(self.task_of)))
        bias = self.param("bias", uniform, (len(self.task_of),))
        x = nn.LayerNorm(_EPS, use_scale=False, use_bias=False)(x) * scale + shift
        of_all = jnp.einsum("btd,dk->btk", x.astype(self.dtype), kernel.astype(self.dtype))
        return of_all[:, jnp.array(self.task_of), jnp.arange(len(self.task_of))].astype(jnp.float32) + bias


class DyTox(nn.Module):
    """See above.

    Attributes:
      task_of_class: the task that each class belongs to, `[K]`, -1 for a class that does not come; T of them.
      width: D; the paper's embed_dim.
      depth: self-attention blocks.
      heads: of attention; divide the width.
      patch: side of the square patches, which divides the image's.
      divergence: whether it has divergence heads: for each task one that tells its classes apart, and all earlier ones as one.
    """

    task_of_class: tuple[int, ...]
    width: int
    depth: int
    heads: int
    patch: int
    divergence: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: jax.Array | None = None) -> dict[str, jax.Array]:
        """images [B, H, W, C] floats -> logits [B, K]; embeddings [B, T, D], and the same as features [B, T * D]; divergence
        `[B, T, M + 1]`, M classes in the largest task. Rows do not mix: train and mask are unused."""
        del train, mask
        rows, height, breadth, _ = images.shape
        if height % self.patch or breadth % self.patch:
            raise refused("model.options.patch", self.patch, f"a side that divides images of {height}x{breadth}")
        side = (height // self.patch, breadth // self.patch)
        window = (self.patch, self.patch)
        embed = nn.Conv(self.width, window, window, padding="VALID", dtype=self.dtype, name="patch_embed")
        position = self.param("pos_embed", _dense_init, (side[0] * side[1], self.width))
        x = embed(images).reshape(rows, -1, self.width) + position
        for number in range(self.depth):
            x = Block(self.heads, self.dtype, name=f"block_{number}")(x, side)
        tasks = max(self.task_of_class) + 1
        tokens = self.param("tokens", _dense_init, (tasks, self.width))
        x = TaskAttention(self.heads, self.dtype, name="task_attention")(tokens, x).astype(jnp.float32)
        logits = Heads(self.task_of_class, self.dtype, name="heads")(x)
        outputs = {"logits": logits, "features": x.reshape(rows, -1), "embeddings": x}
        if self.divergence:
            each = int(np.bincount([task for task in self.task_of_class if task >= 0]).max()) + 1
            owners = tuple(np.arange(tasks).repeat(each).tolist())
            apart = Heads(owners, self.dtype, name="divergence")(x)
            outputs["divergence"] = apart.reshape(rows, tasks, each)
        return outputs
