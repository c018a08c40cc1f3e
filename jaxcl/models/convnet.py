"""A small convolutional network: three blocks, trains on a laptop's CPU where a ResNet does not."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.check import refused
from jaxcl.mesh import Axis
from jaxcl.models._norm import MaskedBatchNorm
from jaxcl.models._options import Norm, Size


class ConvNet(nn.Module):
    """Three blocks of (3x3 convolution, norm, ReLU, 2x2 max-pool), global average pooling, a linear head.

    Attributes:
      width: channels of the first block; each block doubles them, features have 4 * width.
      fold: side of the squares of pixels that become the channels of one position first (space to depth). 2 makes a step on a
        CPU faster at equal width, as its first convolution has fewer positions and more channels.
    """

    num_classes: int
    dtype: jnp.dtype
    axis_name: Axis | None
    width: Size = 32
    norm: Norm = "local"
    fold: Size = 1

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: jax.Array | None = None) -> dict[str, jax.Array]:
        """images `[B, H, W, C]` floats of any size, mask `[B]` -> logits `[B, K]`, features `[B, 4 * width]`."""
        norm = partial(MaskedBatchNorm, axis_name=self.axis_name if self.norm == "sync" else None, dtype=self.dtype)
        x = folded(images.astype(self.dtype), self.fold)
        for channels in (self.width, 2 * self.width, 4 * self.width):
            x = nn.Conv(channels, (3, 3), use_bias=False, kernel_init=nn.initializers.he_normal(), dtype=self.dtype)(x)
            x = nn.relu(norm()(x, train=train, mask=mask))
            x = nn.max_pool(x, (2, 2), (2, 2), "SAME")  # SAME: 1x1 stays 1x1, so that small images pass
        features = x.astype(jnp.float32).mean((1, 2))
        return {"logits": nn.Dense(self.num_classes, name="head")(features), "features": features}


def folded(images: jax.Array, side: int) -> jax.Array:
    """Images `[B, H, W, C]` as `[B, H / side, W / side, side * side * C]`.

    Raises:
      UserError: the sides of the images are no multiple of `side`.
    """
    b, h, w, c = images.shape
    if h % side or w % side:
        raise refused("model.options.fold", side, f"a divisor of the sides of {h} x {w} images")
    squares = images.reshape(b, h // side, side, w // side, side, c).swapaxes(2, 3)
    return squares.reshape(b, h // side, w // side, side * side * c)


convnet = ConvNet
