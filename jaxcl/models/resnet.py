"""ResNet-18 (He et al. 2016) as the continual-learning literature runs it: with a stem for 32x32 images, or ImageNet's.

With 64 channels and 10 classes the 32x32 form has 11,173,962 parameters, the usual PyTorch network to the last weight.
Padding is PyTorch's too (symmetric; XLA's SAME pads one side only where it strides).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models.norm import MaskedBatchNorm

_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    channels: int
    stride: int
    conv: partial
    norm: partial
    last_scale_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None) -> jax.Array:
        y = self.conv(self.channels, (3, 3), self.stride, padding=1)(x)
        y = nn.relu(self.norm()(y, train=train, mask=mask))
        y = self.conv(self.channels, (3, 3), padding=1)(y)
        y = self.norm(scale_init=self.last_scale_init)(y, train=train, mask=mask)
        if x.shape != y.shape:
            x = self.conv(self.channels, (1, 1), self.stride, padding=0, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x, train=train, mask=mask)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """Eight basic blocks in four stages, global average pooling, a linear head.

    Attributes:
      num_classes: K.
      width: channels of the first stage; each stage doubles them, features have 8 * width.
      stem: "small" (3x3, for 32x32 images) or "imagenet" (7x7 with stride 2, then a 3x3 max-pool with stride 2).
      zero_init: start each block as the identity, its last norm at scale 0 (Goyal et al. 2017).
      axis_name: mesh axis over which the norm sums its statistics, None for local ones.
      dtype: of the computation; parameters, statistics, features and logits are float32.
    """

    num_classes: int
    width: int = 64
    stem: str = "small"
    zero_init: bool = False
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: jax.Array | None = None) -> dict[str, jax.Array]:
        """images [B, H, W, C] floats, mask [B] -> logits [B, K], features [B, 8 * width]."""
        conv = partial(nn.Conv, use_bias=False, kernel_init=_he_fan_out, dtype=self.dtype)
        norm = partial(MaskedBatchNorm, axis_name=self.axis_name, dtype=self.dtype)
        last_scale_init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        x = images.astype(self.dtype)
        if self.stem == "imagenet":
            x = conv(self.width, (7, 7), 2, padding=3, name="stem")(x)
        else:
            x = conv(self.width, (3, 3), padding=1, name="stem")(x)
        x = nn.relu(norm(name="stem_norm")(x, train=train, mask=mask))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                x = _Block(self.width * 2**stage, stride, conv, norm, last_scale_init)(x, train=train, mask=mask)
        features = x.astype(jnp.float32).mean((1, 2))
        return {"logits": nn.Dense(self.num_classes, name="head")(features), "features": features}
