"""Who sends which drawn row to whom: the only collectives that move samples.

The plan (`draw.py`) lists the drawn rows of the union in ascending rank, so the rows of one shard stand together. Position
p of the plan goes to device (p + offset) mod N, which deals every shard's rows round-robin: each device receives exactly
r = R / N rows, and a pair of devices exchanges at most ceil(s / N) rows, s being what the source supplies. The transfer is
therefore one `all_to_all` of a few rows a pair, of static capacity; a draw that exceeds it takes a second branch with
capacity r, which always suffices. All devices agree on the branch because they agree on the plan.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.buffer.draw import NONE, Plan

PyTree = Any


def pair_capacity(per_device: int, shards: int) -> int:
    """Rows a pair of devices may exchange in the compact branch.

    With equal shards the number s a source supplies is hypergeometric with mean r = `per_device` and variance below r; six
    standard deviations make the other branch rare.
    """
    return min(per_device, math.ceil((per_device + 6.0 * math.sqrt(per_device)) / shards))


def send_ranks(plan: Plan, me: jax.Array, pair: int) -> jax.Array:
    """What device `me` sends: ranks within its shard, int32 `[N, pair]` by destination; 0 fills the places to spare.

    Its rows are the positions first[me]..first[me+1]-1. Those bound for device d are N apart, and the first of them is
    the one congruent to d - offset modulo N.
    """
    shards = plan.base.shape[0]
    begin, end = plan.first[me], plan.first[me + 1]
    destination = jnp.arange(shards, dtype=jnp.int32)
    nearest = begin + (destination - plan.offset - begin) % shards
    position = nearest[:, None] + shards * jnp.arange(pair, dtype=jnp.int32)[None, :]
    real = position < end
    rank = plan.rank.at[position].get(mode="clip")
    return jnp.where(real, rank - plan.base[me], 0)


def receive_slots(plan: Plan, me: jax.Array, pair: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where device `me` finds its r rows among the `[N * pair]` received: (index, source shard, validity), each `[r]`.

    Its t-th row is the position p with (p + offset) mod R = t * N + me, which is the ((p - first[source]) // N)-th that its
    source sends here.
    """
    count, shards = plan.rank.shape[0], plan.base.shape[0]
    t = jnp.arange(count // shards, dtype=jnp.int32)
    position = (t * shards + me - plan.offset) % count
    valid = plan.rank[position] != NONE
    source = jnp.searchsorted(plan.first, position, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    source = jnp.clip(source, 0, shards - 1)
    index = source * pair + (position - plan.first[source]) // shards
    return jnp.where(valid, index, 0), jnp.where(valid, source, -1), valid


def pack(tree: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """A pytree of arrays `[n, ...]` as one uint8 array `[n, bytes]`, and the way back: one collective instead of one a leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    specs = [(leaf.shape[1:], leaf.dtype) for leaf in leaves]

    def to_bytes(leaf: jax.Array) -> jax.Array:
        n = leaf.shape[0]
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        return lax.bitcast_convert_type(leaf, jnp.uint8).reshape(n, -1)

    def unpack(packed: jax.Array) -> PyTree:
        n, out, at = packed.shape[0], [], 0
        for shape, dtype in specs:
            width = math.prod(shape) * dtype.itemsize
            part = packed[:, at : at + width]
            at += width
            if dtype == jnp.bool_:
                out.append(part.reshape(n, *shape).astype(jnp.bool_))
            elif dtype.itemsize == 1:
                out.append(lax.bitcast_convert_type(part.reshape(n, *shape), dtype))
            else:
                out.append(lax.bitcast_convert_type(part.reshape(n, *shape, dtype.itemsize), dtype))
        return jax.tree.unflatten(treedef, out)

    return jnp.concatenate([to_bytes(leaf) for leaf in leaves], axis=1), unpack


def mix(plan: Plan, axis: str | None, read: Callable[[jax.Array], PyTree]) -> tuple[PyTree, jax.Array, jax.Array]:
    """Gives every device a uniform sample of the union: r rows, dealt from all shards.

    Args:
      plan: the draw, alike on all devices.
      axis: the mesh axis, None for a single device outside `shard_map`.
      read: `(rank int32 [n]) -> pytree of arrays [n, ...]`, rows of this shard by their rank within it.

    Returns:
      (rows `[r, ...]`, zero where invalid; source shard int32 `[r]`, -1 where invalid; validity bool `[r]`).
    """
    count, shards = plan.rank.shape[0], plan.base.shape[0]
    me = jnp.int32(0) if axis is None else lax.axis_index(axis)

    def transfer(pair: int) -> tuple[PyTree, jax.Array, jax.Array]:
        rank = send_ranks(plan, me, pair).reshape(-1)
        packed, unpack = pack(read(rank))
        if shards > 1:
            packed = lax.all_to_all(packed, axis, split_axis=0, concat_axis=0, tiled=True)
        index, source, valid = receive_slots(plan, me, pair)
        return unpack(jnp.where(valid[:, None], packed[index], 0)), source, valid

    per_device = count // shards
    compact = pair_capacity(per_device, shards)
    if compact == per_device:
        return transfer(per_device)
    most = jnp.max(plan.first[1:] - plan.first[:-1])
    fits = (most + shards - 1) // shards <= compact
    return lax.cond(fits, lambda: transfer(compact), lambda: transfer(per_device))
