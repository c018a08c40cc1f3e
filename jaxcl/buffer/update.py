"""Other weights for rows that are stored: priorities as they change with what is learned."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.buffer import shard, weights
from jaxcl.buffer.bits import Spec
from jaxcl.buffer.buffer import Sizes
from jaxcl.buffer.exchange.base import pack
from jaxcl.buffer.policy.base import INT32_MAX
from jaxcl.buffer.rows import check_leaf
from jaxcl.buffer.shard import Drawn, Shard
from jaxcl.check import refused
from jaxcl.errors import UserError


def update_weights(sizes: Sizes, state: Shard, rows: Any, weight: jax.Array) -> Shard:
    """Gives stored rows other weights; one that is not finite or negative changes nothing and is counted as refused.

    Args:
      sizes: of a buffer with weights.
      state: in place when it is donated.
      rows: this device's `Drawn`, whose rows are named by shard, slot and id, so that one that was overwritten meanwhile is
        left out; or ids, int32 `[n]`, of a buffer that knows where they lie: every copy of them is meant.
      weight: float32 `[n]`. Of several for one row the last counts, in the order of devices.

    Raises:
      UserError: the buffer has no weights, ids are given and it does not know where they lie, or an array does not fit.
    """
    if state.weights is None:
        raise refused("buffer.sampling", sizes.sampling, "one of weighted, weighted_with_replacement to have weights")
    by_id = not isinstance(rows, Drawn)
    if by_id and state.slot_of is None:
        raise UserError("update_weights: ids need a buffer with repeats=distinct and num_ids; else give what was drawn")
    named = {"id": rows} if by_id else {"id": rows.id, "slot": rows.slot, "shard": rows.shard}
    n = len(named["id"]) if getattr(named["id"], "ndim", 0) else -1
    for name, x in named.items():
        check_leaf(f"update_weights: {name}", x, Spec((), jnp.dtype("int32")), n)
    check_leaf("update_weights: weights", weight, Spec((), jnp.dtype("float32")), n)
    named = jax.tree.map(jnp.asarray, {**named, "weight": weight})
    if sizes.axis is not None:
        packed, unpacked = pack(named)
        named = unpacked(lax.all_gather(packed, sizes.axis, tiled=True))
    ident, ok = named["id"], weights.usable(named["weight"])
    slot = state.slot_of.at[ident].get(mode="clip") if by_id else named["slot"]  # type: ignore[union-attr]
    found = (ident >= 0) & (state.id.at[slot].get(mode="clip") == ident)
    if not by_id and sizes.memory != "replicated":
        found &= named["shard"] == sizes.device()
    slot = shard.keep_last(jnp.where(found & ok, slot, sizes.policy.slots), sizes.policy.slots)
    lost = jnp.minimum(jnp.sum(found & ~ok, dtype=jnp.int32), INT32_MAX - state.refused)
    tree = weights.put(state.weights, slot, named["weight"])
    return dataclasses.replace(state, weights=tree, refused=state.refused + lost)
