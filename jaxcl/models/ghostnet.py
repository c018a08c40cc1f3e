"""GhostNet (Han et al. 2020): half of every layer's channels are made from the other half by a cheap depthwise convolution.

Layers and rounding of channels are those of the authors' code and of timm: 5,182,508 parameters at width 1.0 and 2,587,292
at 0.5, with 1,000 classes. The dropout before the head is left out: a forward pass here takes no random numbers.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.mesh import Axis
from jaxcl.models._blocks import ConvNorm, SqueezeExcite, divisible, identity
from jaxcl.models._norm import MaskedBatchNorm
from jaxcl.models._options import Norm, Scale, Stem

# kernel, expanded channels, output channels, squeeze-and-excite, stride
_BOTTLENECKS = (
    (3, 16, 16, False, 1),
    (3, 48, 24, False, 2),
    (3, 72, 24, False, 1),
    (5, 72, 40, True, 2),
    (5, 120, 40, True, 1),
    (3, 240, 80, False, 2),
    (3, 200, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 480, 112, True, 1),
    (3, 672, 112, True, 1),
    (5, 672, 160, True, 2),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
)


class _Ghost(nn.Module):
    """A 1x1 convolution to half the channels, a 3x3 depthwise one of its output to the other half."""

    channels: int
    layer: partial

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None) -> jax.Array:
        half = -(-self.channels // 2)
        primary = self.layer(half, 1)(x, train=train, mask=mask)
        cheap = self.layer(half, 3, depthwise=True)(primary, train=train, mask=mask)
        return jnp.concatenate([primary, cheap], -1)[..., : self.channels]


class _Bottleneck(nn.Module):
    """Two ghost layers, between them a depthwise convolution where it strides; the shortcut is convolved where it must be."""

    kernel: int
    expanded: int
    channels: int
    excite: bool
    stride: int
    layer: partial

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None) -> jax.Array:
        linear = partial(self.layer, activation=identity)
        spatial = partial(linear, kernel=self.kernel, stride=self.stride, depthwise=True)
        y = _Ghost(self.expanded, self.layer)(x, train=train, mask=mask)
        if self.stride > 1:
            y = spatial(self.expanded)(y, train=train, mask=mask)
        if self.excite:
            y = SqueezeExcite(divisible(self.expanded / 4, 4), self.layer.keywords["dtype"])(y)
        y = _Ghost(self.channels, linear)(y, train=train, mask=mask)
        if x.shape != y.shape:
            x = spatial(x.shape[-1], name="shortcut_depthwise")(x, train=train, mask=mask)
            x = linear(self.channels, 1, name="shortcut")(x, train=train, mask=mask)
        return x + y


class GhostNet(nn.Module):
    """Sixteen ghost bottlenecks, global average pooling, a hidden layer of 1,280 units, a linear head.

    Attributes:
      width: multiplies the channels of every layer but the hidden one.
      stem: "small" (stride 1, for 32x32 images) or "imagenet" (stride 2); both 3x3 and of the same parameters.
    """

    num_classes: int
    dtype: jnp.dtype
    axis_name: Axis | None
    width: Scale = 1.0
    norm: Norm = "local"
    stem: Stem = "small"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: jax.Array | None = None) -> dict[str, jax.Array]:
        """images `[B, H, W, C]` floats, mask `[B]` -> logits `[B, K]`, features `[B, 1280]`."""
        norm = partial(MaskedBatchNorm, axis_name=self.axis_name if self.norm == "sync" else None, dtype=self.dtype)
        layer = partial(ConvNorm, norm=norm, dtype=self.dtype)

        def scaled(channels: int) -> int:
            return divisible(channels * self.width, 4)

        x = images.astype(self.dtype)
        x = layer(scaled(16), 3, stride=2 if self.stem == "imagenet" else 1, name="stem")(x, train=train, mask=mask)
        for kernel, expanded, channels, excite, stride in _BOTTLENECKS:
            x = _Bottleneck(kernel, scaled(expanded), scaled(channels), excite, stride, layer)(
                x, train=train, mask=mask
            )
        x = layer(scaled(960), 1, name="last")(x, train=train, mask=mask).astype(jnp.float32).mean((1, 2))
        features = nn.relu(nn.Dense(1280, dtype=self.dtype, name="hidden")(x)).astype(jnp.float32)
        return {"logits": nn.Dense(self.num_classes, name="head")(features), "features": features}


ghostnet = GhostNet
