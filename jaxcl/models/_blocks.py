"""Layers that several families of convolutional networks share. Padding is PyTorch's: symmetric, also where it strides."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models._depthwise import depthwise
from jaxcl.models._norms import Normalisation
from jaxcl.models._norms.base import Mask

he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def identity(x: jax.Array) -> jax.Array:
    return x


def divisible(channels: float, by: int) -> int:
    """The multiple of `by` nearest to `channels`, at least `by` and not below 90 % of `channels` (MobileNet's rule)."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


class ConvNorm(nn.Module):
    """A convolution without bias, a norm, an activation.

    Attributes:
      channels: of the output; with `depthwise` those of the input, each convolved alone.
      kernel, stride: of the square window.
      same: pads as TensorFlow does, which where it strides is not symmetric; a depthwise one is then computed by `depthwise`.
      norm: the convolution's and the layer's, see `Normalisation`.
      dtype: of the computation.
    """

    channels: int
    kernel: int
    norm: Normalisation
    stride: int = 1
    depthwise: bool = False
    same: bool = False
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: Mask) -> jax.Array:
        """x `[B, H, W, C]`, mask `[B]` -> `[B, H / stride, W / stride, channels]`, sides rounded up."""
        x = self.norm.conv(
            self.channels,
            (self.kernel, self.kernel),
            self.stride,
            padding="SAME" if self.same else self.kernel // 2,
            feature_group_count=self.channels if self.depthwise else 1,
            use_bias=False,
            kernel_init=he_fan_out,
            dtype=self.dtype,
            conv_general_dilated=depthwise if self.depthwise and self.same else None,
        )(x)
        return self.activation(self.norm.layer()(x, train=train, mask=mask))


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the means of all channels. Hu et al. 2018.

    Attributes:
      squeezed: units of the hidden layer.
      dtype: of the computation.
    """

    squeezed: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x `[B, H, W, C]` -> the same shape."""
        means = x.astype(jnp.float32).mean((1, 2), keepdims=True)
        hidden = nn.relu(nn.Dense(self.squeezed, dtype=self.dtype)(means))
        return x * nn.hard_sigmoid(nn.Dense(x.shape[-1], dtype=self.dtype)(hidden))
