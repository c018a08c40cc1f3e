"""ResNet-50 (He et al. 2016), of bottlenecks; see `_resnet`."""

import flax.linen as nn
import jax.numpy as jnp

from jaxcl.models._options import Norm, Size, Stem
from jaxcl.models._resnet import ResNet


def resnet50(
    num_classes: int,
    *,
    dtype: jnp.dtype,
    axis_name: str | None,
    width: Size = 64,
    norm: Norm = "local",
    stem: Stem = "small",
    zero_init: bool = False,
) -> nn.Module:
    """Options: see `ResNet`; `width` channels in the first stage, features have 32 * width."""
    axis = axis_name if norm == "sync" else None
    return ResNet(num_classes, (3, 4, 6, 3), True, width, stem, zero_init, axis, dtype)
