"""BatchNorm of groups of rows, each normalised by its own statistics in training, and all by common ones in evaluation."""

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.mesh import Axis
from jaxcl.models._norms.base import Mask, NormLayer, RowFacts, facts_of, row_moments, sums_of_groups, to_rows, variance


class Groups(NamedTuple):
    """A division of this device's rows.

    Attributes:
      group: int32 `[n]`, of each row.
      number: S, how many there are.
      across: whether a group's rows lie on all devices; else every device has S groups of its own.
    """

    group: jax.Array
    number: int
    across: bool


class GroupedBatchNorm(NormLayer):
    """A norm for which a subclass divides the rows. Parameters and collections are those of `MaskedBatchNorm`.

    The running statistics follow the mean over the groups of their statistics. A group without a valid row is normalised by
    the running ones.

    Attributes:
      counts_empty: whether such a group counts in that mean, with the running statistics; a mean over those with rows would
        need to know of all devices' groups.
    """

    counts_empty: ClassVar[bool] = True

    def groups(self, facts: RowFacts) -> Groups:
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: Mask = None) -> jax.Array:
        """x `[n, ..., C]` -> the same shape; in training `mask` is `RowFacts`."""
        channels = x.shape[-1]
        affine, running = self.affine(channels), self.running(channels)
        x = x.astype(jnp.float32)
        if not train:
            return self.normalised(x, running[0].value, running[1].value, affine)
        group, number, across = self.groups(facts_of(mask))
        count, mean, var = statistics(x, mask, group, number, self.axis_name if across else None)
        there = (count > 0)[:, None]
        mean, var = (jnp.where(there, new, old.value) for new, old in zip((mean, var), running, strict=True))
        weights = jnp.full(number, 1 / number) if self.counts_empty else there[:, 0] / jnp.maximum(jnp.sum(there), 1)
        for old, new in zip(running, (mean, var), strict=True):
            old.value += (1 - self.momentum) * (weights @ (new - old.value))
        return self.normalised(x, to_rows(mean, group), to_rows(var, group), affine)


def statistics(
    x: jax.Array, mask: Mask, group: jax.Array, groups: int, axis_name: Axis | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each of S groups the valid rows `[S]`, their mean `[S, C]` and their variance; see `moments_of_groups`.

    What rows differ by from each other is squared after the mean is taken away: of few rows the mean of squares less the square
    of the mean leaves more rounding than variance. Where groups lie on several devices this is a second collective.
    """
    means, squares = row_moments(x)
    sums = sums_of_groups(jnp.concatenate([means, jnp.ones((len(x), 1))], -1), mask, group, groups, axis_name)
    count = sums[:, -1]
    per_row = 1 / jnp.maximum(count, 1)[:, None]
    mean = sums[:, :-1] * per_row
    apart = jnp.square(means - to_rows(mean, group))
    if x.ndim > 2:  # the positions within a row
        apart += variance(means, squares)
    return count, mean, sums_of_groups(apart, mask, group, groups, axis_name) * per_row
