"""One device's share of the rehearsal buffer: rows in, rows out. No mesh, no collective.

The share is a pytree of arrays with a leading axis of slots, and the small integer metadata of its policy. Which slot a
row takes is the policy's decision (`policy/`), made without looking at the record.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.buffer.sort import last_of_each
from jaxcl.buffer.weights import Weights
from jaxcl.types import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows, such as those on their way into the buffer, which completes what is None.

    Attributes:
      record: pytree of arrays `[n, ...]`; the buffer stores each leaf bit for bit and never looks inside.
      label: int32 `[n]`, the class of each row, read by policies that balance classes; 0 if not given.
      id: int32 `[n]`, at least 0, the identity of each row in its data set; if not given a number that no other row of this
        buffer has, up to 2**31 rows.
      valid: bool `[n]`; an invalid row is never stored. True if not given.
      weight: float32 `[n]`, finite and not negative, of weighted sampling: rows are drawn in proportion to it, never one of
        weight 0. If not given the greatest that this shard has stored so far, 1 at first.
    """

    record: PyTree
    label: Any = None
    id: Any = None
    valid: Any = None
    weight: Any = dataclasses.field(default=None, kw_only=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn(Rows):
    """Representatives: rows drawn from the union of the shards.

    Where the union held fewer rows than were asked for they are not valid, and hold zeros, label 0, id -1.

    Attributes:
      shard: int32 `[n]`, the shard each row was drawn from (-1 where invalid).
      slot: int32 `[n]`, of weighted sampling: where it lies there, for `update_weights`.
      importance: float32 `[n]`, of weighted sampling, see `weights.make_weighted_plan`; 0 where invalid.
      length: int32 `[n]`, of windows: how many rows of the window follow one another, 1..L; 0 where invalid. Leaves of the
        record are `[n, L, ...]`, zero behind that; label, id and weight are those of the first row.
    """

    shard: Any = None
    slot: Any = dataclasses.field(default=None, kw_only=True)
    importance: Any = dataclasses.field(default=None, kw_only=True)
    length: Any = dataclasses.field(default=None, kw_only=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shard:
    """What a device stores; as a global array, every leaf is split over the devices along its leading axis.

    Attributes:
      record: pytree of arrays `[slots, ...]`, stored as `bits` says.
      label: int32 `[slots]`.
      id: int32 `[slots]`, -1 where nothing was written yet.
      meta: the policy's metadata, leaves `[1, ...]`.
      came: int32 `[1]`, rows that this device was given, modulo 2**32; None of rows that are no buffer's.
      refused: int32 `[1]`, valid rows that could not be stored because of their id, label or weight; saturates. None likewise.
      slot_of: int32 `[num_ids]`, the slot at which each id was last stored here, 0 before; None unless copies are refused.
      weights: of weighted sampling; else None.
      class_rows: int32 `[1, K]`, rows of each class; None unless they are counted.
    """

    record: PyTree
    label: jax.Array
    id: jax.Array
    meta: PyTree
    came: Any = None
    refused: Any = None
    slot_of: jax.Array | None = None
    weights: Weights | None = None
    class_rows: Any = None


def empty(record: PyTree, slots: int, meta: PyTree) -> Shard:
    """A share without rows. `record` is a pytree of `jax.ShapeDtypeStruct` of one record as it is stored."""
    return Shard(
        record=jax.tree.map(lambda s: jnp.zeros((slots, *s.shape), s.dtype), record),
        label=jnp.zeros((slots,), jnp.int32),
        id=jnp.full((slots,), -1, jnp.int32),
        meta=meta,
    )


def keep_last(slot: jax.Array, slots: int) -> jax.Array:
    """Of several rows bound for one slot only the last keeps it; the others are sent out of range.

    A scatter with repeated indices has no defined order (on GPU not even a whole winner); this makes the batch mean what a
    loop over its rows would mean. Every dropped row gets an index of its own, so that the indices are truly unique.
    """
    last = last_of_each(jnp.minimum(slot, slots), slots + 1)
    return jnp.where(last & (slot < slots), slot, slots + jnp.arange(slot.shape[0], dtype=jnp.int32))


def write(shard: Shard, rows: Rows, slot: jax.Array) -> Shard:
    """Stores `rows`, their record in bits, at `slot` (int32 `[n]`, unique or out of range = not stored), in place when `shard`
    is donated."""

    def put(stored: jax.Array, new: jax.Array) -> jax.Array:
        return stored.at[slot].set(new, mode="drop", unique_indices=True)

    return dataclasses.replace(
        shard,
        record=jax.tree.map(put, shard.record, rows.record),
        label=put(shard.label, rows.label),
        id=put(shard.id, rows.id),
    )


def read(shard: Shard, slot: jax.Array) -> tuple[PyTree, jax.Array, jax.Array]:
    """The (record, label, id) stored at `slot` (int32 `[n]`).

    No gradient goes through it: on a mesh none could, as rows travel as bytes, and a result shall not depend on the mesh.
    """
    stored = lax.stop_gradient((shard.record, shard.label, shard.id))
    return jax.tree.map(lambda leaf: leaf.at[slot].get(mode="clip"), stored)
