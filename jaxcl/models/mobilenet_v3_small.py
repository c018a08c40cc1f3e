"""MobileNetV3-small (Howard et al. 2019): inverted residuals with squeeze-and-excite and hard-swish.

Layers, channels and the norm's constants are torchvision's: 2,542,856 parameters with 1,000 classes. The dropout before
the head is left out: a forward pass here takes no random numbers.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.mesh import Axis
from jaxcl.models._blocks import ConvNorm, SqueezeExcite, divisible, identity
from jaxcl.models._norm import MaskedBatchNorm
from jaxcl.models._options import Norm, Stem

# kernel, expanded channels, output channels, squeeze-and-excite, activation, stride
_RESIDUALS = (
    (3, 16, 16, True, nn.relu, 2),
    (3, 72, 24, False, nn.relu, 2),
    (3, 88, 24, False, nn.relu, 1),
    (5, 96, 40, True, nn.hard_swish, 2),
    (5, 240, 40, True, nn.hard_swish, 1),
    (5, 240, 40, True, nn.hard_swish, 1),
    (5, 120, 48, True, nn.hard_swish, 1),
    (5, 144, 48, True, nn.hard_swish, 1),
    (5, 288, 96, True, nn.hard_swish, 2),
    (5, 576, 96, True, nn.hard_swish, 1),
    (5, 576, 96, True, nn.hard_swish, 1),
)


class MobileNetV3Small(nn.Module):
    """Eleven inverted residuals, global average pooling, a hidden layer of 1,024 units, a linear head.

    Attributes:
      stem: "small" (stride 1, for 32x32 images) or "imagenet" (stride 2); both 3x3 and of the same parameters.
    """

    num_classes: int
    dtype: jnp.dtype
    axis_name: Axis | None
    norm: Norm = "local"
    stem: Stem = "small"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: jax.Array | None = None) -> dict[str, jax.Array]:
        """images `[B, H, W, C]` floats, mask `[B]` -> logits `[B, K]`, features `[B, 1024]`."""
        axis = self.axis_name if self.norm == "sync" else None
        norm = partial(MaskedBatchNorm, axis_name=axis, momentum=0.99, epsilon=1e-3, dtype=self.dtype)
        layer = partial(ConvNorm, norm=norm, dtype=self.dtype)
        rows: Any = {"train": train, "mask": mask}
        stride = 2 if self.stem == "imagenet" else 1
        x = layer(16, 3, stride=stride, activation=nn.hard_swish, name="stem")(images.astype(self.dtype), **rows)
        for kernel, expanded, channels, excite, activation, stride in _RESIDUALS:
            y = x
            if expanded != x.shape[-1]:
                y = layer(expanded, 1, activation=activation)(y, **rows)
            y = layer(expanded, kernel, stride=stride, depthwise=True, activation=activation)(y, **rows)
            if excite:
                y = SqueezeExcite(divisible(expanded // 4, 8), self.dtype)(y)
            y = layer(channels, 1, activation=identity)(y, **rows)
            x = x + y if x.shape == y.shape else y
        x = layer(576, 1, activation=nn.hard_swish, name="last")(x, **rows).astype(jnp.float32).mean((1, 2))
        features = nn.hard_swish(nn.Dense(1024, dtype=self.dtype, name="hidden")(x)).astype(jnp.float32)
        return {"logits": nn.Dense(self.num_classes, name="head")(features), "features": features}


mobilenet_v3_small = MobileNetV3Small
