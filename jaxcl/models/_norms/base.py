"""What the norms share: what they are told of a batch's rows, statistics of groups of rows, the fields of a layer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.errors import UserError
from jaxcl.mesh import Axis


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowFacts:
    """What a norm may know of the n rows on this device; a model hands it on as its `mask`.

    Attributes:
      valid: bool `[n]`.
      task: int32 `[n]`, the task with which each row arrived first; of rows that are not valid anything.
      replayed: bool `[n]`, whether it comes from the memory.
      place: int32 `[n]`, its number among the rows of its part over all devices: among the new rows, or those of a draw.
      of: int32 `[n]`, the rows of that part over all devices.
      now: int32 scalar, the present task.
      batch_size: B, new rows of a step over all devices.
    """

    valid: jax.Array
    task: jax.Array
    replayed: jax.Array
    place: jax.Array
    of: jax.Array
    now: jax.Array
    batch_size: int = dataclasses.field(metadata={"static": True})


def always(batch_size: int, devices: int) -> bool:
    return devices > 1


def never(batch_size: int, devices: int) -> bool:
    return False


Mask = jax.Array | RowFacts | None
PENALTIES = "penalties"  # the collection into which a layer sows its terms of the loss


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """A norm as a model uses it.

    Attributes:
      layer: makes a layer, called as `layer(scale_init=..., name=...)` with what `NormLayer` has, and the layer as
        `layer(x, train=..., mask=...)`.
      conv: the convolutions that go with it.
      reads: whether its layers read `RowFacts`; else the model's mask is a plain array.
      fits: `(batch_size)`, raises a UserError where its options do not go with this many new rows a step; None: all do.
      meets: `(batch_size, devices)`, whether statistics in training are of rows of several devices.
    """

    layer: Callable[..., nn.Module]
    conv: type[nn.Conv] = nn.Conv
    reads: bool = False
    fits: Callable[[int], None] | None = None
    meets: Callable[[int, int], bool] = always


class NormLayer(nn.Module):
    """What every layer is made with. Params `scale` and `bias`, `[C]` float32; statistics are float32 always.

    Attributes:
      axis_name: mesh axis of the batch, or axes, inside shard_map; None where this device has the whole batch.
      momentum: weight of the old running statistics in an update.
      epsilon: added to the variance.
      dtype: of the output.
      scale_init: initialiser of `scale`; zeros makes a residual block start as the identity.
    """

    axis_name: Axis | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    def affine(self, channels: int) -> tuple[jax.Array, jax.Array]:
        """The parameters `scale` and `bias`."""
        scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
        return scale, self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)

    def running(self, channels: int) -> tuple[nn.Variable, nn.Variable]:
        """The running statistics `mean` and `var` among batch_stats, `[C]`."""
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        return mean, self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)

    def normalised(
        self, x: jax.Array, mean: jax.Array, var: jax.Array, affine: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        """x `[n, ..., C]` by statistics of all rows `[C]`, or of each row `[n, C]`."""
        scale, bias = affine
        if mean.ndim > 1:
            mean, var = (expanded(statistic, x.ndim) for statistic in (mean, var))
        return ((x - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias).astype(self.dtype)


def expanded(rows: jax.Array, ndim: int) -> jax.Array:
    """Rows `[n, C]` as `[n, 1, ..., C]`, to meet arrays of so many axes."""
    return rows.reshape(len(rows), *[1] * (ndim - 2), rows.shape[-1])


def row_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each row of x `[n, ..., C]` the mean over positions and that of squares, `[n, C]`."""
    positions = tuple(range(1, x.ndim - 1))
    return x.mean(positions), jnp.square(x).mean(positions)


def moments_of_groups(
    x: jax.Array, mask: Mask, group: jax.Array, groups: int, axis_name: Axis | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each of S groups the valid rows `[S]`, the mean of their channels `[S, C]` and that of the squares; one collective.

    Args:
      x: `[n, ..., C]`.
      group: int32 `[n]`, the group of each row.
      groups: S.
      axis_name: a group's rows lie on all devices along it; None: on this device.
    """
    # Rows are reduced over positions first, so that the weights touch [n, 2C + 1] and not the whole of x.
    rows = jnp.concatenate([*row_moments(x), jnp.ones((len(x), 1))], -1)
    sums = sums_of_groups(rows, mask, group, groups, axis_name)
    count = sums[:, -1]
    mean, mean_of_squares = jnp.split(sums[:, :-1] / jnp.maximum(count, 1)[:, None], 2, -1)
    return count, mean, mean_of_squares


def sums_of_groups(rows: jax.Array, mask: Mask, group: jax.Array, groups: int, axis_name: Axis | None) -> jax.Array:
    """Rows `[n, M]`, the valid ones of each group added up over the devices along the axis: `[S, M]`."""
    valid = jnp.ones(len(rows)) if mask is None else valid_of(mask).astype(jnp.float32)
    sums = jnp.einsum("ns,nm->sm", of_groups(group, groups) * valid[:, None], rows, precision="highest")
    return sums if axis_name is None else lax.psum(sums, axis_name)


def of_groups(group: jax.Array, groups: int) -> jax.Array:
    """float32 `[n, S]`: 1 where the row is of the group."""
    return (group[:, None] == jnp.arange(groups)).astype(jnp.float32)


def to_rows(statistic: jax.Array, group: jax.Array) -> jax.Array:
    """What a row's group has, `[S, C]` -> `[n, C]`."""
    return jnp.einsum("ns,sc->nc", of_groups(group, len(statistic)), statistic, precision="highest")


def variance(mean: jax.Array, mean_of_squares: jax.Array) -> jax.Array:
    return jnp.maximum(mean_of_squares - jnp.square(mean), 0)  # rounding may leave -1e-9


def valid_of(mask: jax.Array | RowFacts) -> jax.Array:
    """Which rows count, `[n]`."""
    return mask.valid if isinstance(mask, RowFacts) else mask


def facts_of(mask: Mask) -> RowFacts:
    """Raises:
    UserError: the caller hands over a plain mask.
    """
    if not isinstance(mask, RowFacts):
        raise UserError("model.options: this network needs to know of rows whence they come: give RowFacts for mask")
    return mask
