"""The interface of a policy, and what several share.

A policy is written for one device's share. The shares of N devices together hold exactly `capacity` rows: the union's
row numbers 0..capacity-1 are dealt round-robin, number g to shard g mod N, so shares differ by at most one row.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.types import PyTree

INT32_MAX = np.iinfo(np.int32).max


class Choose(Protocol):
    """Slots for a batch of rows, as a loop over the rows in their order would choose them."""

    def __call__(
        self, meta: PyTree, key: jax.Array, shard: jax.Array, label: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        """Chooses.

        Args:
          meta: this shard's metadata.
          key: a key for this shard and this insert alone.
          shard: int32 scalar, the shard's number.
          label: int32 `[n]`.
          valid: bool `[n]`; invalid rows take no slot and change nothing.

        Returns:
          slot: int32 `[n]`; a value >= `slots` stores nothing; of equal ones the last row is meant to win.
          meta: the new metadata.
        """


class Policy(NamedTuple):
    """A policy bound to its sizes.

    Attributes:
      init: `(shard) -> meta`, metadata of an empty shard; leaves `[1, ...]`.
      choose: see `Choose`.
      locate: `(meta, shard, rank) -> slot`: where the stored rows number `rank` (int32 `[n]`, 0..size-1) lie.
      size: `(meta, shard) -> int32 scalar`, rows stored in this shard.
      slots: rows a shard has memory for.
      class_sizes: `(meta) -> int32 [K]`, rows of each class in this shard, for policies whose ranks run class by class; else
        None.
    """

    init: Callable[[jax.Array], PyTree]
    choose: Choose
    locate: Callable[[PyTree, jax.Array, jax.Array], jax.Array]
    size: Callable[[PyTree, jax.Array], jax.Array]
    slots: int
    class_sizes: Callable[[PyTree], jax.Array] | None = None


def share(shard: jax.Array, capacity: jax.Array | int, shards: int) -> jax.Array:
    """How many of the row numbers 0..capacity-1 are dealt to `shard`: those congruent to it modulo `shards`."""
    return (capacity - shard + shards - 1) // shards


def earlier_same(label: jax.Array, valid: jax.Array) -> jax.Array:
    """For each row of a batch, how many valid rows before it have its label (int32 `[n]`)."""
    n = label.shape[0]
    before = jnp.tri(n, k=-1, dtype=bool)
    return jnp.sum((label[:, None] == label[None, :]) & before & valid[None, :], axis=1, dtype=jnp.int32)
