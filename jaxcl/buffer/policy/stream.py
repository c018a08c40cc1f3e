"""Policies that look at the order of arrival alone: a reservoir and a memory bank."""

import jax.numpy as jnp

from jaxcl.buffer import threefry as random
from jaxcl.buffer.policy.base import INT32_MAX, Policy, share


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
        drawn = random.below(random.words(key, label.shape[0]), number + 1)
        slot = jnp.where(number < room, number, drawn)
        added = jnp.minimum(jnp.sum(valid, dtype=jnp.int32), INT32_MAX - 1 - seen)
        return jnp.where(valid & (slot < room), slot, slots), {"seen": (seen + added)[None]}

    def locate(meta, shard, rank):
        return rank

    def size(meta, shard):
        return jnp.minimum(meta["seen"][0], share(shard, capacity, shards))

    return Policy(init, choose, locate, size, slots)


def fifo(capacity: int, shards: int) -> Policy:
    """A memory bank (Wu et al. 2018; He et al. 2020): each shard is a ring that keeps the last `share` rows it was given."""
    slots = -(-capacity // shards)

    def init(shard):
        return {"next": jnp.zeros((1,), jnp.int32), "fill": jnp.zeros((1,), jnp.int32)}

    def choose(meta, key, shard, label, valid):
        room = share(shard, capacity, shards)
        number = meta["next"][0] + jnp.cumsum(valid, dtype=jnp.int32) - valid
        added = jnp.sum(valid, dtype=jnp.int32)
        meta = {"next": (meta["next"] + added) % room, "fill": jnp.minimum(meta["fill"] + added, room)}
        return jnp.where(valid, number % room, slots), meta

    def locate(meta, shard, rank):
        return rank

    def size(meta, shard):
        return meta["fill"][0]

    return Policy(init, choose, locate, size, slots)
