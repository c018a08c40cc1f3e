"""PtychoNN (Cherukara et al. 2020): from a diffraction pattern to the amplitude and the phase of the object behind it.

An encoder and two decoders, one for each; layers are those of the code in use for continual learning (Bouvier et al.), of
4,694,690 parameters at width 32. Not a classifier: its outputs are images.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.errors import UserError
from jaxcl.models._options import Size

_LEVELS = 4  # poolings; images halve at each


class PtychoNN(nn.Module):
    """Blocks of two 3x3 convolutions with ReLU, each followed by a 2x2 max-pool (encoder) or bilinear upsampling (decoders).

    Attributes:
      width: channels of the first block; those of the encoder are 1, 2, 4 and 8 times as many.
    """

    dtype: jnp.dtype
    width: Size = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: jax.Array | None = None) -> dict[str, jax.Array]:
        """images `[B, H, W, C]` floats -> amplitude `[B, H, W, 1]`, any number, and phase `[B, H, W, 1]`, -pi..pi, float32.

        Rows do not meet: train and mask are unused.

        Raises:
          UserError: H or W is not a multiple of 16.
        """
        del train, mask
        if images.shape[1] % 2**_LEVELS or images.shape[2] % 2**_LEVELS:
            raise UserError(
                f"model.name: ptychonn is not allowed with images of {images.shape[1:3]}, give multiples of {2**_LEVELS}"
            )
        conv = partial(nn.Conv, kernel_size=(3, 3), dtype=self.dtype)
        encoder = [self.width * 2**level for level in range(_LEVELS)]

        def block(x: jax.Array, channels: int) -> jax.Array:
            return nn.relu(conv(channels)(nn.relu(conv(channels)(x))))

        def decode(x: jax.Array) -> jax.Array:
            for channels in (encoder[-1], *encoder[-2::-1]):
                x = block(x, channels)
                x = jax.image.resize(x, (len(x), 2 * x.shape[1], 2 * x.shape[2], channels), "bilinear")
            return conv(1)(x).astype(jnp.float32)

        x = images.astype(self.dtype)
        for channels in encoder:
            x = nn.max_pool(block(x, channels), (2, 2), (2, 2))
        return {"amplitude": decode(x), "phase": jnp.pi * jnp.tanh(decode(x))}


ptychonn = PtychoNN
