"""Which slot a candidate takes: pure functions of small integer metadata, never of the payload.

A policy is written for one device's share. The shares of N devices together hold exactly `capacity` rows: the union's
row numbers 0..capacity-1 are dealt round-robin, number g to shard g mod N, so shares differ by at most one row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.errors import UserError

PyTree = Any
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


def reservoir(capacity: int, shards: int) -> Policy:
    """Reservoir sampling of each shard's own stream (Vitter 1985, algorithm R).

    After s rows have come to a shard, each of them is stored with probability min(1, share / s), whatever their order and
    classes. The count of rows seen is part of the state, so a resumed run continues it; it saturates at 2**31 - 2.
    """
    slots = -(-capacity // shards)

    def init(shard):
        return {"seen": jnp.zeros((1,), jnp.int32)}

    def choose(meta, key, shard, label, valid):
        room = share(shard, capacity, shards)
        seen = meta["seen"][0]
        number = seen + jnp.minimum(jnp.cumsum(valid, dtype=jnp.int32) - valid, INT32_MAX - 1 - seen)
        drawn = jax.random.randint(key, label.shape, 0, number + 1)
        slot = jnp.where(number < room, number, drawn)
        added = jnp.minimum(jnp.sum(valid, dtype=jnp.int32), INT32_MAX - 1 - seen)
        return jnp.where(valid & (slot < room), slot, slots), {"seen": (seen + added)[None]}

    def locate(meta, shard, rank):
        return rank

    def size(meta, shard):
        return jnp.minimum(meta["seen"][0], share(shard, capacity, shards))

    return Policy(init, choose, locate, size, slots)


def class_random(capacity: int, shards: int, num_classes: int, accept: float) -> Policy:
    """One sub-buffer a class (Bouvier et al. 2024, section IV-B): append while the class has room, then accept each row
    with probability `accept` (the paper's c/b) and overwrite a uniform row of its class.

    Class k owns the row numbers [first(k), first(k+1)) of the union, about capacity / K of them, and shard i keeps those
    congruent to i: with fewer rows a class than shards a class lives on some shards only, and its rows that arrive
    elsewhere are not stored.
    """
    slots = -(-capacity // shards)
    quota, spare = divmod(capacity, num_classes)

    def first(shard, k):
        """The slot on `shard` at which the rows of class k begin."""
        return share(shard, k * quota + jnp.minimum(k, spare), shards)

    def init(shard):
        return {"fill": jnp.zeros((1, num_classes), jnp.int32)}

    def choose(meta, key, shard, label, valid):
        fill = meta["fill"][0]
        k = jnp.arange(num_classes, dtype=jnp.int32)
        begin = first(shard, k)
        room = first(shard, k + 1) - begin
        number = fill[label] + earlier_same(label, valid)
        accept_key, slot_key = jax.random.split(key)
        accepted = jax.random.uniform(accept_key, label.shape) < accept
        anywhere = jax.random.randint(slot_key, label.shape, 0, jnp.maximum(room[label], 1))
        append = number < room[label]
        slot = begin[label] + jnp.where(append, number, anywhere)
        kept = valid & (append | accepted) & (room[label] > 0)
        added = jnp.sum((label[:, None] == k[None, :]) & valid[:, None], axis=0, dtype=jnp.int32)
        return jnp.where(kept, slot, slots), {"fill": jnp.minimum(fill + added, room)[None]}

    def locate(meta, shard, rank):
        # Rank counts the stored rows class by class; each sub-buffer is filled from its beginning.
        until = jnp.cumsum(meta["fill"][0])
        k = jnp.searchsorted(until, rank, side="right", method="scan_unrolled").astype(jnp.int32)
        k = jnp.minimum(k, num_classes - 1)
        return first(shard, k) + rank - (until[k] - meta["fill"][0, k])

    def size(meta, shard):
        return jnp.sum(meta["fill"])

    return Policy(init, choose, locate, size, slots, class_sizes=lambda meta: meta["fill"][0])


def make_policy(
    name: str, *, capacity: int, shards: int, num_classes: int | None = None, accept: float | None = None
) -> Policy:
    """The policy called `name`, one of `POLICIES`, for a union of `capacity` rows over `shards` devices.

    Raises:
      UserError: unknown name, a size out of range, or an argument the policy needs and did not get.
    """
    if name not in POLICIES:
        raise UserError(f"buffer.policy: {name!r} is unknown, choose one of {', '.join(POLICIES)}")
    if capacity < shards:
        raise UserError(
            f"buffer.capacity: {capacity} rows cannot be shared by {shards} devices, give at least {shards}"
        )
    if name == "reservoir":
        return reservoir(capacity, shards)
    if num_classes is None or num_classes < 1:
        raise UserError(f"buffer.policy: {name} needs num_classes, a positive number, got {num_classes}")
    if capacity < num_classes:
        raise UserError(
            f"buffer.capacity: {capacity} rows cannot hold {num_classes} classes, give at least {num_classes}"
        )
    if accept is None or not 0.0 < accept <= 1.0:
        raise UserError(f"buffer.policy: {name} needs accept = candidates / batch_size in (0, 1], got {accept}")
    return class_random(capacity, shards, num_classes, accept)


POLICIES = ("class_random", "reservoir")
