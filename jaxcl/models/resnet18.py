"""ResNet-18 (He et al. 2016); see `_resnet`."""

import flax.linen as nn
import jax.numpy as jnp

from jaxcl.models._options import Norm, Size, Stem
from jaxcl.models._resnet import ResNet


def resnet18(
    num_classes: int,
    *,
    dtype: jnp.dtype,
    axis_name: str | None,
    width: Size = 64,
    norm: Norm = "local",
    stem: Stem = "small",
    zero_init: bool = False,
) -> nn.Module:
    """Options: see `ResNet`; `width` channels in the first stage, features have 8 * width."""
    axis = axis_name if norm == "sync" else None
    return ResNet(num_classes, (2, 2, 2, 2), False, width, stem, zero_init, axis, dtype)
