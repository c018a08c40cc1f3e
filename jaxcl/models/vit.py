"""Vision Transformer (Dosovitskiy et al. 2021, An image is worth 16x16 words): B and L, and the sizes Ti and S of DeiT (Touvron
et al. 2021).

With 1,000 classes, images of 224x224 and patches of 16, parameters are those published: Ti 5,717,416, S 22,050,664, B
86,567,656, L 304,326,632. Layers are named as timm's are, with what they hold as Flax lays it out:

    timm                          here
    patch_embed.proj              patch_embed        kernel [P, P, C, D]
    cls_token, pos_embed          cls_token, pos_embed, without their axis of rows
    blocks.N.norm1, .norm2        block_N.norm1, .norm2: weight is scale
    blocks.N.attn.qkv             block_N.attn.query, .key, .value, a third each: kernel [D, H, D / H], bias [H, D / H]
    blocks.N.attn.proj            block_N.attn.out   kernel [H, D / H, D]
    blocks.N.mlp.fc1, .fc2        block_N.fc1, .fc2
    norm, head                    norm, head

With `prompts` (see `_prompts`) there is one part more, `prompts`, which is no part of the backbone: that may be frozen. The
network is run twice, without prompts for the queries and with them; the backward pass goes through the second run alone.

Dropout and stochastic depth are left out: a forward pass here takes no random numbers.
"""

import functools
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxcl.check import Rule, is_number, refused
from jaxcl.mesh import Axis
from jaxcl.models._norms.base import Mask
from jaxcl.models._options import Size
from jaxcl.models._prompts import NOTHING, Added, Options, Prefix, make_prompts
from jaxcl.partition import BLOCK, Split

_init = nn.initializers.truncated_normal(0.02)
_EPS = 1e-6  # of the layer norms: that of the paper's code and of timm
_OrOwn = Annotated[
    int, Rule(lambda x: isinstance(x, int) and is_number(x) and x >= 0, "a positive int, or 0: the size's own")
]


class _Shape(NamedTuple):
    width: int
    depth: int
    heads: int


SIZES = {"Ti": _Shape(192, 12, 3), "S": _Shape(384, 12, 6), "B": _Shape(768, 12, 12), "L": _Shape(1024, 24, 16)}


def vit(
    *,
    num_classes: int,
    dtype: jnp.dtype,
    axis_name: Axis | None,
    classes: np.ndarray,
    size: Literal["Ti", "S", "B", "L"] = "Ti",
    patch: Size = 4,
    remat: bool = False,
    width: _OrOwn = 0,
    depth: _OrOwn = 0,
    heads: _OrOwn = 0,
    gelu: Literal["exact", "tanh"] = "exact",
    prompts: Options = MappingProxyType({}),
) -> nn.Module:
    """Options: see `ViT`; `width`, `depth` and `heads` are those of the size where they are 0. Those of `prompts`: a `kind`,
    and its own, see `_prompts`; {} for none."""
    own = SIZES[size]
    width, depth, heads = width or own.width, depth or own.depth, heads or own.heads
    if width % heads:
        raise refused("model.options.heads", heads, f"a divisor of width = {width}")
    own_prompts = make_prompts(prompts, width=width, depth=depth, heads=heads, tasks=len(classes), axis_name=axis_name)
    return ViT(num_classes, dtype, width, depth, heads, patch, remat, gelu == "tanh", own_prompts)


def _attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, prefix: Prefix | None, **unused: Any
) -> jax.Array:
    """`[B, P, H, D / H]` each -> the same shape. The softmax is float32; Flax's then multiplies the values in float32 too.
    `prefix` has further keys and values."""
    if prefix is not None:
        key, value = (jnp.concatenate([p.astype(x.dtype), x], 1) for p, x in zip(prefix, (key, value), strict=True))
    return jax.nn.dot_product_attention(query, key, value)


class Block(nn.Module):
    """Self-attention, and a perceptron of two layers, four times as wide in between; each behind a norm, beside a short cut."""

    heads: int
    dtype: jnp.dtype
    tanh: bool

    @nn.compact
    def __call__(self, x: jax.Array, prefix: Prefix | None = None) -> jax.Array:
        """x `[B, P, D]` -> the same shape."""
        width = x.shape[-1]
        attention = functools.partial(_attention, prefix=prefix)
        attend = nn.MultiHeadDotProductAttention(
            self.heads, dtype=self.dtype, kernel_init=_init, attention_fn=attention, name="attn"
        )
        x = x + attend(nn.LayerNorm(_EPS, dtype=self.dtype, name="norm1")(x))
        wide = nn.Dense(4 * width, kernel_init=_init, dtype=self.dtype, name="fc1")(
            nn.LayerNorm(_EPS, dtype=self.dtype, name="norm2")(x)
        )
        x = x + nn.Dense(width, kernel_init=_init, dtype=self.dtype, name="fc2")(nn.gelu(wide, approximate=self.tanh))
        return checkpoint_name(x, BLOCK)


class ViT(nn.Module):
    """See above.

    Attributes:
      width: D.
      depth: blocks.
      heads: H of attention; they divide the width.
      patch: side of the square patches, which divides the image's: 16 for images of 224x224, 4 for 32x32.
      remat: whether the backward pass computes each block anew instead of keeping what is in it: a third more operations, and
        activations of one block and of the borders between them instead of all.
      tanh: whether GELU is its approximation by tanh, as in the paper's own code; timm has the exact one.
      prompts: see `_prompts`; None for none. Their weights have no rule: every device holds them whole.
    """

    # Tensor parallelism as in Megatron-LM (Shoeybi et al. 2019): heads, and what is between the perceptron's layers, are
    # divided along `model`; the sum of their parts is the one message of attention, and of the perceptron. The other long
    # axis of every kernel is divided along `fsdp`.
    rules: ClassVar[tuple[Split, ...]] = (
        Split(r"attn\.(query|key|value)\.kernel", ("fsdp", "model", None)),
        Split(r"attn\.(query|key|value)\.bias", ("model", None)),
        Split(r"attn\.out\.kernel", ("model", None, "fsdp")),
        Split(r"fc1\.kernel", ("fsdp", "model")),
        Split(r"fc1\.bias", ("model",)),
        Split(r"fc2\.kernel", ("model", "fsdp")),
        Split(r"patch_embed\.kernel", (None, None, None, "fsdp")),
        Split(r"pos_embed", (None, "fsdp")),
        Split(r"head\.kernel", ("fsdp", None)),
    )
    num_classes: int
    dtype: jnp.dtype
    width: int
    depth: int
    heads: int
    patch: int
    remat: bool
    tanh: bool
    prompts: Any

    @property
    def reads(self) -> bool:
        """See `Model`."""
        return self.prompts is not None and self.prompts.reads

    @property
    def mixes(self) -> str:
        """See `Model`."""
        return "" if self.prompts is None else self.prompts.mixes

    @property
    def begin(self) -> Any:
        """See `Model`."""
        return None if self.prompts is None else self.prompts.begin

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: Mask = None) -> dict[str, jax.Array]:
        """images `[B, H, W, C]` floats -> logits `[B, K]`, features `[B, D]`: of the class token, or what the prompts have the
        head read. Without prompts rows do not mix, and train and mask are unused."""
        rows, height, breadth, _ = images.shape
        if height % self.patch or breadth % self.patch:
            raise refused("model.options.patch", self.patch, f"a side that divides images of {height}x{breadth}")
        window = (self.patch, self.patch)
        embed = nn.Conv(
            self.width, window, window, padding="VALID", kernel_init=_init, dtype=self.dtype, name="patch_embed"
        )
        x = embed(images).reshape(rows, -1, self.width)
        token = self.param("cls_token", _init, (1, self.width)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (rows, 1, self.width)), x], axis=1)
        x = x + self.param("pos_embed", _init, x.shape[1:]).astype(self.dtype)
        make = nn.remat(Block) if self.remat else Block
        blocks = [make(self.heads, self.dtype, self.tanh, name=f"block_{number}") for number in range(self.depth)]
        norm = nn.LayerNorm(_EPS, name="norm")

        def behind_blocks(x: jax.Array, added: Added = NOTHING) -> jax.Array:
            for number, block in enumerate(blocks):
                if number in added.tokens:
                    x = jnp.concatenate([added.tokens[number].astype(x.dtype), x], axis=1)
                x = block(x, added.prefixes.get(number))
            return x

        features = norm(behind_blocks(x)[:, 0].astype(jnp.float32))
        if self.prompts is not None:
            added = self.prompts(lax.stop_gradient(features), train=train, mask=mask)
            features = norm(behind_blocks(x, added)[:, added.read].astype(jnp.float32)).mean(1)
        return {"logits": nn.Dense(self.num_classes, kernel_init=_init, name="head")(features), "features": features}
