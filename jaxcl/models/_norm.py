"""Batch normalisation in which invalid rows weigh nothing, on one device or exactly over all of them.

Ioffe & Szegedy 2015. Linen's BatchNorm averages per-device means, which is wrong when the devices hold different
numbers of valid rows and NaN when one holds none. This one adds up weighted sums and divides once.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.mesh import Axis


class MaskedBatchNorm(nn.Module):
    """Normalises the last axis over valid rows and positions.

    Parameters and collections are those of Linen's BatchNorm: params `scale`, `bias`, and batch_stats `mean`, `var`
    (biased), all `[C]` float32. Where no row is valid, the running statistics normalise and stay as they are.
    Initialise with train=False: an initialisation is no batch, and runs outside shard_map.

    Attributes:
      axis_name: mesh axis, or axes, to sum statistics over, inside shard_map; None for this device's own statistics.
      momentum: weight of the old running statistics in an update.
      epsilon: added to the variance.
      dtype: of the output; statistics are float32 always.
      scale_init: initialiser of `scale`; zeros makes a residual block start as the identity.
    """

    axis_name: Axis | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """x `[B, ..., C]` -> the same shape. mask: `[B]` bool or float row weights, None for all ones."""
        channels = x.shape[-1]
        scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        x = x.astype(jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            count, batch_mean, batch_var = self._statistics(x, mask)
            mean, var = jnp.where(count > 0, batch_mean, mean), jnp.where(count > 0, batch_var, var)
            running_mean.value += (1 - self.momentum) * (mean - running_mean.value)  # exactly 0 where count is 0
            running_var.value += (1 - self.momentum) * (var - running_var.value)
        return ((x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias).astype(self.dtype)

    def _statistics(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Weight of the valid rows [], their mean `[C]` and biased variance `[C]`; one collective."""
        # Rows are reduced over positions first: the weights then touch [B, C] instead of the whole of x, and the count
        # of rows (not of positions) is exact in float32 at any scale.
        positions = tuple(range(1, x.ndim - 1))
        moments = jnp.concatenate([x.mean(positions), jnp.square(x).mean(positions)], -1)  # [B, 2C]
        weights = jnp.ones(len(x)) if mask is None else mask.astype(jnp.float32)
        sums = jnp.append((weights[:, None] * moments).sum(0), weights.sum())  # [2C + 1]
        if self.axis_name is not None:
            sums = jax.lax.psum(sums, self.axis_name)
        count = sums[-1]
        mean, mean_of_squares = jnp.split(sums[:-1] / jnp.where(count > 0, count, 1), 2)
        return count, mean, jnp.maximum(mean_of_squares - jnp.square(mean), 0)  # rounding may leave -1e-9
