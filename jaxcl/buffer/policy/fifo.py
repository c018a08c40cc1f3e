"""A memory bank (Wu et al. 2018; He et al. 2020): the rows that came last."""

import jax.numpy as jnp
import numpy as np

from jaxcl.buffer.policy.base import Budget, Moves, Policy, bind, dealt, int32, merge, rank_is_slot


def fifo(budget: Budget) -> Policy:
    """Each shard is a ring that keeps the last `share` rows it was given."""
    return bind(budget, init=_init, choose=_choose, locate=rank_is_slot, size=_size, move=_move)


def _init(budget, shard):
    return {"next": jnp.zeros((1,), jnp.int32), "fill": jnp.zeros((1,), jnp.int32)}


def _choose(budget, meta, key, shard, label, valid):
    room = budget.room(shard)
    number = meta["next"][0] + jnp.cumsum(valid, dtype=jnp.int32) - valid
    added = jnp.sum(valid, dtype=jnp.int32)
    meta = {"next": (meta["next"] + added) % room, "fill": jnp.minimum(meta["fill"] + added, room)}
    return jnp.where(valid, number % room, budget.slots), meta


def _size(budget, meta, shard):
    return meta["fill"][0]


def _move(budget: Budget, meta: dict[str, np.ndarray], label: np.ndarray, old: int) -> Moves:
    """Rings, oldest rows first; rows of one age go to different shards."""
    before, rings = Budget(budget.capacity, old), []
    for s, (after, fill, room) in enumerate(zip(meta["next"], meta["fill"], before.rooms(), strict=True)):
        rings.append(s * before.slots + (after - fill + np.arange(fill)) % room)
    take = merge(rings, align_ends=True)
    fill = dealt(len(take), budget.shards)
    row = np.arange(len(take))
    return Moves(take, row % budget.shards, row // budget.shards, int32(next=fill % budget.rooms(), fill=fill))
