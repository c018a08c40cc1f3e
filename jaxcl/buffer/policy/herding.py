"""Exemplars in rank order (Rebuffi et al. 2017, algorithms 3 to 5), for rows that come best first."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.buffer.policy.base import (
    Budget,
    Moves,
    Policy,
    bind,
    check_classes,
    deal_by_class,
    int32,
    merge,
    rank_is_slot,
)


def herding(budget: Budget) -> Policy:
    """A row is appended to its class while the shard has room. In a full shard it takes the slot of the last exemplar of a
    largest class if that class stays at least as large as its own, else it is not stored. So classes that are offered
    enough rows share the memory to within one row, and a class that shrinks keeps its first, best rows. Among equally large
    classes shard i takes from the one next above class K - 1 - i: shards take from different classes. Nothing is random.

    `jaxcl.buffer.selection` ranks the rows. Each class is a list linked from its last row back: O(K) a row, in a loop over the
    rows, which takes no step where no row can be stored.

    Raises:
      UserError: `num_classes` is missing.
    """
    check_classes(budget, "herding")
    return bind(budget, classes=budget.classes, init=_init, choose=_choose, locate=rank_is_slot, size=_size, move=_move)


def _init(budget, shard):
    return {
        "previous": jnp.zeros((1, budget.slots), jnp.int32),
        "last": jnp.zeros((1, budget.classes), jnp.int32),
        "stored": jnp.zeros((1, budget.classes), jnp.int32),
    }


def _choose(budget, meta, key, shard, label, valid):
    previous, last, stored = (meta[name][0] for name in ("previous", "last", "stored"))
    room = budget.room(shard)
    n = label.shape[0]
    # In a full shard the largest class shrinks only when another grows: if no row can, none will.
    steps = jnp.where(jnp.any(_is_taken(room, stored, label, valid)), n, 0)
    slot = jnp.full_like(label, budget.slots)
    one = functools.partial(_take, budget, shard, room, label, valid)
    previous, last, stored, slot = lax.fori_loop(0, steps, one, (previous, last, stored, slot))
    return slot, {"previous": previous[None], "last": last[None], "stored": stored[None]}


def _is_taken(room, stored, label, valid):
    return valid & ((jnp.sum(stored) < room) | (stored[label] + 1 < jnp.max(stored)))


def _take(budget, shard, room, label, valid, i, carry):
    """Row i of the batch."""
    previous, last, stored, slot = carry
    classes, slots = jnp.arange(budget.classes, dtype=jnp.int32), budget.slots
    c, size = label[i], jnp.sum(stored)
    store, free = _is_taken(room, stored, c, valid[i]), size < room
    turn = jnp.where(stored == jnp.max(stored), (classes + shard) % budget.classes, -1)
    victim = jnp.argmax(turn)
    at = jnp.where(free, size, last[victim])
    at = jnp.where(store, at, slots)
    # A write that holds what was read, of two entries, the second out of range: XLA turns other forms into a copy of
    # `previous` a row.
    pair = jnp.stack([at, jnp.int32(slots + 1)])
    read = previous.at[pair].get(mode="clip")
    before = read[0]
    written = jnp.where(read < 0, read, last[c])
    previous = previous.at[pair].set(written, mode="drop", unique_indices=True)
    last = jnp.where(store & ~free & (classes == victim), before, last)
    last = jnp.where(store & (classes == c), at, last)
    stored = stored + store * ((classes == c).astype(jnp.int32) - ((classes == victim) & ~free))
    return previous, last, stored, slot.at[i].set(at)


def _size(budget, meta, shard):
    return jnp.sum(meta["stored"])


def _move(budget: Budget, meta: dict[str, np.ndarray], label: np.ndarray, old: int) -> Moves:
    """Lists by rank: the best rows of all old shards come first in the new ones."""
    before, rows = Budget(budget.capacity, old), []
    for k in range(budget.classes):
        ranked = []
        for s, (last, stored) in enumerate(zip(meta["last"][:, k], meta["stored"][:, k], strict=True)):
            slot, back = last, []
            for _ in range(stored):
                back.append(s * before.slots + int(slot))
                slot = meta["previous"][s, slot]
            ranked.append(np.array(back[::-1], np.int64))
        rows.append(merge(ranked))
    take, shard, slot, stored = deal_by_class(budget, np.concatenate(rows), label)
    previous = np.zeros((budget.shards, budget.slots), np.int32)
    last = np.zeros((budget.shards, budget.classes), np.int32)
    for m, at, k in zip(shard, slot, label[take], strict=True):
        previous[m, at], last[m, k] = last[m, k], at
    return Moves(take, shard, slot, int32(previous=previous, last=last, stored=stored))
