"""Batch normalisation in which invalid rows weigh nothing, on one device or exactly over all of them.

Ioffe & Szegedy 2015. Linen's BatchNorm averages per-device means, which is wrong when the devices hold different
numbers of valid rows and NaN when one holds none. This one adds up weighted sums and divides once.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models._norms.base import Mask, NormLayer, row_moments, valid_of, variance


class MaskedBatchNorm(NormLayer):
    """Normalises the last axis over valid rows and positions.

    Parameters and collections are those of Linen's BatchNorm: params `scale`, `bias`, and batch_stats `mean`, `var`
    (biased), all `[C]` float32. Where no row is valid, the running statistics normalise and stay as they are.
    Initialise with train=False: an initialisation is no batch, and runs outside shard_map.

    Statistics are summed over `axis_name`; None for this device's own.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: Mask = None) -> jax.Array:
        """x `[B, ..., C]` -> the same shape. mask: `[B]` bool or float row weights, or `RowFacts`; None for all ones."""
        channels = x.shape[-1]
        affine, (running_mean, running_var) = self.affine(channels), self.running(channels)
        x = x.astype(jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            count, batch_mean, batch_var = self._statistics(x, mask)
            mean, var = jnp.where(count > 0, batch_mean, mean), jnp.where(count > 0, batch_var, var)
            running_mean.value += (1 - self.momentum) * (mean - running_mean.value)  # exactly 0 where count is 0
            running_var.value += (1 - self.momentum) * (var - running_var.value)
        return self.normalised(x, mean, var, affine)

    def _statistics(self, x: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Weight of the valid rows [], their mean `[C]` and biased variance `[C]`; one collective."""
        # Rows are reduced over positions first: the weights then touch [B, C] instead of the whole of x, and the count
        # of rows (not of positions) is exact in float32 at any scale.
        moments = jnp.concatenate(row_moments(x), -1)  # [B, 2C]
        weights = jnp.ones(len(x)) if mask is None else valid_of(mask).astype(jnp.float32)
        sums = jnp.append((weights[:, None] * moments).sum(0), weights.sum())  # [2C + 1]
        if self.axis_name is not None:
            sums = jax.lax.psum(sums, self.axis_name)
        count = sums[-1]
        mean, mean_of_squares = jnp.split(sums[:-1] / jnp.where(count > 0, count, 1), 2)
        return count, mean, variance(mean, mean_of_squares)
