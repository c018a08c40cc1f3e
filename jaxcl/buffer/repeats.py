"""At most one copy of a row: with several epochs the same examples come by again and would fill a reservoir with copies.

`Shard.slot_of` remembers for each id the slot at which the shard last stored it; the id is stored still if that slot holds
it. So nothing has to be cleared when a row is overwritten, and the cost is that of the batch, whatever the capacity.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.buffer.shard import Rows, Shard
from jaxcl.buffer.sort import first_of_each
from jaxcl.mesh import Axis

REPEATS = ("all", "first_epoch", "distinct")


def distinct(shard: Shard, rows: Rows, axis: Axis | None) -> Rows:
    """Marks rows invalid whose id is stored, or is that of an earlier valid row of the batch.

    "Stored" and "earlier" mean in any shard and in the batch of all devices along `axis`, in the order of devices; None: in
    this shard and in `rows`, which are then the same on all devices that matter. The look-up is made before the insert: a
    row whose copy this very batch overwrites is refused as well. O(B log B) for B rows in all; one all_gather, one psum.
    """
    assert shard.slot_of is not None
    ids = jnp.where(rows.valid, rows.id, -1)
    if axis is not None:
        ids = lax.all_gather(ids, axis, tiled=True)
    stored = shard.id.at[shard.slot_of.at[ids].get(mode="clip")].get(mode="clip") == ids
    if axis is not None:
        stored = lax.psum(stored.astype(jnp.int32), axis) > 0
    fresh = first_of_each(ids + 1, len(shard.slot_of) + 1) & ~stored
    if axis is not None:
        n = len(rows.id)
        fresh = lax.dynamic_slice_in_dim(fresh, lax.axis_index(axis) * n, n)
    return dataclasses.replace(rows, valid=rows.valid & fresh)


def remember(slot_of: jax.Array, ids: jax.Array, slot: jax.Array, slots: int) -> jax.Array:
    """`slot_of` after the rows `ids` were written to `slot` (a value >= `slots` = not stored). Ids must differ."""
    nowhere = len(slot_of) + jnp.arange(len(ids), dtype=jnp.int32)
    return slot_of.at[jnp.where(slot < slots, ids, nowhere)].set(slot, mode="drop", unique_indices=True)
