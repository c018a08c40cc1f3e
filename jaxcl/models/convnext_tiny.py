"""ConvNeXt-tiny (Liu et al. 2022): a ResNet with large depthwise kernels, layer norms and inverted bottlenecks.

28,589,128 parameters with 1,000 classes and ImageNet's stem, as torchvision's. Rows do not meet: there is no batch norm.
Stochastic depth is left out: a forward pass here takes no random numbers.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models._options import Size, Stem

_DEPTHS = (3, 3, 9, 3)
_init = nn.initializers.truncated_normal(0.02)


class _Block(nn.Module):
    """7x7 depthwise convolution, layer norm, two dense layers, a scale that starts at 1e-6, beside the identity."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        y = nn.Conv(channels, (7, 7), feature_group_count=channels, kernel_init=_init, dtype=self.dtype)(x)
        y = nn.LayerNorm(dtype=self.dtype)(y)
        y = nn.gelu(nn.Dense(4 * channels, kernel_init=_init, dtype=self.dtype)(y), approximate=False)
        y = nn.Dense(channels, kernel_init=_init, dtype=self.dtype)(y)
        return x + y * self.param("scale", nn.initializers.constant(1e-6), (channels,)).astype(self.dtype)


class ConvNeXt(nn.Module):
    """Stages of 3, 3, 9 and 3 blocks, each entered by a strided convolution, global average pooling, a linear head.

    Attributes:
      width: channels of the first stage; each stage doubles them, features have 8 * width.
      stem: "small" (2x2 patches, for 32x32 images) or "imagenet" (4x4 patches).
    """

    num_classes: int
    dtype: jnp.dtype
    width: Size = 96
    stem: Stem = "small"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: jax.Array | None = None) -> dict[str, jax.Array]:
        """images `[B, H, W, C]` floats -> logits `[B, K]`, features [B, 8 * width]. train and mask are unused."""
        del train, mask
        norm = partial(nn.LayerNorm, dtype=self.dtype)

        def patches(x: jax.Array, channels: int, side: int) -> jax.Array:
            conv = nn.Conv(channels, (side, side), side, padding="VALID", kernel_init=_init, dtype=self.dtype)
            return conv(x)

        x = norm()(patches(images.astype(self.dtype), self.width, 4 if self.stem == "imagenet" else 2))
        for stage, depth in enumerate(_DEPTHS):
            if stage:
                x = patches(norm()(x), self.width * 2**stage, 2)
            for _ in range(depth):
                x = _Block(self.dtype)(x)
        features = nn.LayerNorm(name="last_norm")(x.astype(jnp.float32).mean((1, 2)))
        return {"logits": nn.Dense(self.num_classes, kernel_init=_init, name="head")(features), "features": features}


convnext_tiny = ConvNeXt
