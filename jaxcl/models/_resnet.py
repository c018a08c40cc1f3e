"""ResNet-18 and ResNet-50 (He et al. 2016), with a stem for 32x32 images or with ImageNet's.

Parameters are those of the usual PyTorch networks to the last weight: 11,689,512 and 25,557,032 with 1,000 classes and
ImageNet's stem (torchvision), 11,173,962 for ResNet-18 with 10 classes and the stem for 32x32. Padding is PyTorch's too
(symmetric; XLA's SAME pads one side only where it strides). A bottleneck strides in its 3x3 convolution, as torchvision's.
"""

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.mesh import Axis
from jaxcl.models._blocks import he_fan_out
from jaxcl.models._norm import MaskedBatchNorm
from jaxcl.models._options import Norm, Size, Stem


class _Block(nn.Module):
    """Convolutions beside a shortcut, which is a 1x1 convolution where the shape changes.

    Basic: two 3x3 convolutions. Bottleneck: 1x1, 3x3 and a 1x1 that widens four times.
    """

    channels: int
    stride: int
    bottleneck: bool
    conv: partial
    norm: partial
    last_scale_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None) -> jax.Array:
        c, s = self.channels, self.stride
        # channels, kernel and stride of each convolution
        plan = [(c, 1, 1), (c, 3, s), (4 * c, 1, 1)] if self.bottleneck else [(c, 3, s), (c, 3, 1)]
        *inner, (channels, kernel, stride) = plan
        y = x
        for width, side, step in inner:
            y = self.conv(width, (side, side), step, padding=side // 2)(y)
            y = nn.relu(self.norm()(y, train=train, mask=mask))
        y = self.conv(channels, (kernel, kernel), stride, padding=kernel // 2)(y)
        y = self.norm(scale_init=self.last_scale_init)(y, train=train, mask=mask)
        if x.shape != y.shape:
            x = self.conv(channels, (1, 1), self.stride, padding=0, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x, train=train, mask=mask)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Residual blocks in four stages, global average pooling, a linear head.

    Attributes:
      blocks: of each stage.
      bottleneck: the kind of block; it widens the features from 8 to 32 times `width`.
      width: channels of the first stage; each stage doubles them.
      stem: "small" (3x3, for 32x32 images) or "imagenet" (7x7 with stride 2, then a 3x3 max-pool with stride 2).
      zero_init: start each block as the identity, its last norm at scale 0 (Goyal et al. 2017).
    """

    blocks: ClassVar[tuple[int, ...]]
    bottleneck: ClassVar[bool]
    num_classes: int
    dtype: jnp.dtype
    axis_name: Axis | None
    width: Size = 64
    norm: Norm = "local"
    stem: Stem = "small"
    zero_init: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: jax.Array | None = None) -> dict[str, jax.Array]:
        """images `[B, H, W, C]` floats, mask `[B]` -> logits `[B, K]`, features `[B, D]`, D = 8 or 32 times width."""
        conv = partial(nn.Conv, use_bias=False, kernel_init=he_fan_out, dtype=self.dtype)
        norm = partial(MaskedBatchNorm, axis_name=self.axis_name if self.norm == "sync" else None, dtype=self.dtype)
        last_scale_init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        x = images.astype(self.dtype)
        if self.stem == "imagenet":
            x = conv(self.width, (7, 7), 2, padding=3, name="stem")(x)
        else:
            x = conv(self.width, (3, 3), padding=1, name="stem")(x)
        x = nn.relu(norm(name="stem_norm")(x, train=train, mask=mask))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                stride = 2 if stage and i == 0 else 1
                block = _Block(self.width * 2**stage, stride, self.bottleneck, conv, norm, last_scale_init)
                x = block(x, train=train, mask=mask)
        features = x.astype(jnp.float32).mean((1, 2))
        return {"logits": nn.Dense(self.num_classes, name="head")(features), "features": features}
