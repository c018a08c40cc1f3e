"""GroupNorm (Wu & He 2018): each row by the mean and variance over its positions and a group of channels. Rows do not meet, so
it is the same for every batch, in training and in evaluation, on any number of devices."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.check import refused
from jaxcl.models._norms._standardised import StandardisedConv
from jaxcl.models._norms.base import Mask, Normalisation, NormLayer, expanded, never, row_moments
from jaxcl.models._options import Size


class GroupNorm(NormLayer):
    """See above; params `scale` and `bias`, no running statistics.

    Attributes:
      groups: of channels next to each other, equally large.
    """

    groups: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: Mask = None) -> jax.Array:
        """x `[n, ..., C]` -> the same shape."""
        del train, mask
        x = x.astype(jnp.float32)
        return self.normalised(x, *group_statistics(x, self.groups), self.affine(x.shape[-1]))


def group_statistics(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each row's groups of channels, as each channel has them, `[n, C]`.

    Raises:
      UserError: the groups do not divide the channels.
    """
    channels = x.shape[-1]
    if channels % groups:
        raise refused("model.options.norm_options.groups", groups, f"a divisor of the {channels} channels of a layer")

    def of_group(each: jax.Array) -> jax.Array:
        return each.reshape(len(each), groups, -1).mean(-1).repeat(channels // groups, -1)

    mean = of_group(x.mean(tuple(range(1, x.ndim - 1))))
    _, mean_of_squares = row_moments(x - expanded(mean, x.ndim))  # centred first: few numbers make a group
    return mean, of_group(mean_of_squares)


def group(groups: Size = 8, standardise: bool = False) -> Normalisation:
    """`groups`: the paper's 32 for networks of 64 channels and more. `standardise`: the weights too, see `_standardised`."""
    conv = StandardisedConv if standardise else nn.Conv
    return Normalisation(partial(GroupNorm, groups=groups), conv=conv, meets=never)
