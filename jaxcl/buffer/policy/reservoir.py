"""Reservoir sampling of each shard's own stream (Vitter 1985, algorithm R)."""

import jax.numpy as jnp
import numpy as np

from jaxcl.buffer import threefry as random
from jaxcl.buffer.policy.base import INT32_MAX, Budget, Moves, Policy, bind, dealt, int32, merge, rank_is_slot


def reservoir(budget: Budget) -> Policy:
    """After s rows have come to a shard, each of them is stored with probability min(1, share / s), whatever their order
    and classes. The count of rows seen is part of the state, so a resumed run continues it; it saturates at 2**31 - 2."""
    return bind(budget, init=_init, choose=_choose, locate=rank_is_slot, size=_size, move=_move)


def _init(budget, shard):
    return {"seen": jnp.zeros((1,), jnp.int32)}


def _choose(budget, meta, key, shard, label, valid):
    room = budget.room(shard)
    seen = meta["seen"][0]
    number = seen + jnp.minimum(jnp.cumsum(valid, dtype=jnp.int32) - valid, INT32_MAX - 1 - seen)
    drawn = random.below(random.words(key, label.shape[0]), number + 1)
    slot = jnp.where(number < room, number, drawn)
    added = jnp.minimum(jnp.sum(valid, dtype=jnp.int32), INT32_MAX - 1 - seen)
    return jnp.where(valid & (slot < room), slot, budget.slots), {"seen": (seen + added)[None]}


def _size(budget, meta, shard):
    return jnp.minimum(meta["seen"][0], budget.room(shard))


def _move(budget: Budget, meta: dict[str, np.ndarray], label: np.ndarray, old: int) -> Moves:
    """Shards stay reservoirs of about equal streams: what all have seen is dealt out like the rows. Only rows seen by shards
    that were full while others were not cannot all be counted, as a shard with room must have stored all it has seen."""
    before = Budget(budget.capacity, old)
    seen = meta["seen"].astype(np.int64)
    stored = np.minimum(seen, before.rooms())
    take = merge([s * before.slots + np.arange(n) for s, n in enumerate(stored)])
    fill = dealt(len(take), budget.shards)
    full = fill == budget.rooms()
    seen_now = fill.copy()
    if full.any():
        seen_now[full] += dealt(int(seen.sum() - stored.sum()), int(full.sum()))
    row = np.arange(len(take))
    meta = int32(seen=np.minimum(seen_now, INT32_MAX - 1))
    return Moves(take, row % budget.shards, row // budget.shards, meta)
