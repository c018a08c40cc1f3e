"""Batch-channel normalisation: by estimates of the batch statistics that move slowly, then GroupNorm; with weight
standardisation.

Qiao et al. 2019, Micro-batch training with batch-channel normalization and weight standardization, algorithm 1, for one or
two rows a device. In training, without a gradient,

    mean <- mean + (1 - m) (mean of the batch - mean),  var <- var + (1 - m) (mean of (x - mean)^2 - var)

with the mean before its update in the second, as in the authors' code; then x is normalised by these estimates in training as
in evaluation, scaled and shifted by channel, and normalised once more over groups of channels. Here the moments of the batch
are those of the valid rows on all devices.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.models._norms._standardised import StandardisedConv
from jaxcl.models._norms.base import Mask, Normalisation, NormLayer, moments_of_groups
from jaxcl.models._norms.group import group_statistics
from jaxcl.models._options import Size


class BatchChannelNorm(NormLayer):
    """See above; params `batch_scale` and `batch_bias`, then `scale` and `bias`; batch_stats `mean` and `var`, all `[C]`.

    Attributes:
      groups: of channels next to each other, equally large.
    """

    groups: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: Mask = None) -> jax.Array:
        """x `[n, ..., C]` -> the same shape."""
        channels = x.shape[-1]
        running_mean, running_var = self.running(channels)
        x = x.astype(jnp.float32)
        if train:
            alone = jnp.zeros(len(x), jnp.int32)
            count, mean, mean_of_squares = moments_of_groups(lax.stop_gradient(x), mask, alone, 1, self.axis_name)
            old = running_mean.value
            about_old = mean_of_squares[0] - 2 * old * mean[0] + jnp.square(old)
            var = jnp.maximum(about_old, 0)  # rounding may leave -1e-9
            speed = jnp.where(count[0] > 0, 1 - self.momentum, 0.0)
            running_mean.value += speed * (mean[0] - old)
            running_var.value += speed * (var - running_var.value)
        own = self.param("batch_scale", nn.initializers.ones, (channels,), jnp.float32)
        shift = self.param("batch_bias", nn.initializers.zeros, (channels,), jnp.float32)
        x = (x - running_mean.value) * (lax.rsqrt(running_var.value + self.epsilon) * own) + shift
        return self.normalised(x, *group_statistics(x, self.groups), self.affine(channels))


def bcn(groups: Size = 8, standardise: bool = True) -> Normalisation:
    """`groups`: the paper's 32 for networks of 64 channels and more."""
    conv = StandardisedConv if standardise else nn.Conv
    return Normalisation(partial(BatchChannelNorm, groups=groups), conv=conv)
