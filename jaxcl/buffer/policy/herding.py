"""Exemplars in rank order (Rebuffi et al. 2017, algorithms 3 to 5), for rows that come best first."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.buffer.policy.base import (
    Budget,
    Moves,
    Policy,
    arrivals,
    bind,
    check_classes,
    compacted,
    deal_by_class,
    int32,
    merge,
    rank_is_slot,
    trips,
    turns,
)


def herding(budget: Budget) -> Policy:
    """A row is appended to its class while the shard has room. In a full shard it takes the slot of the last exemplar of a
    largest class if that class stays at least as large as its own, else it is not stored. So classes that are offered
    enough rows share the memory to within one row, and a class that shrinks keeps its first, best rows. Among equally large
    classes it is the shards' turn (`turns`), so that the union is fair as with `class_balanced`, and then the last class.
    Nothing is random.

    `jaxcl.buffer.selection` ranks the rows. Each class is a list linked from its last row back. The rows that find room are
    placed at once, O(n log n); those that others make room for in a loop over the rows that can be stored, O(K) each.

    Raises:
      UserError: `num_classes` is missing.
    """
    check_classes(budget, "herding")
    return bind(
        budget,
        classes=budget.classes,
        init=_init,
        choose=_choose,
        locate=rank_is_slot,
        size=_size,
        without=_without,
        move=_move,
    )


def _init(budget, shard):
    return {
        "previous": jnp.zeros((1, budget.slots), jnp.int32),
        "last": jnp.zeros((1, budget.classes), jnp.int32),
        "stored": jnp.zeros((1, budget.classes), jnp.int32),
    }


def _choose(budget, meta, key, shard, label, valid):
    # `previous` keeps its axis of one: under vmap XLA copies all of it to put the axis back.
    previous, last, stored = meta["previous"], meta["last"][0], meta["stored"][0]
    slots, turn = budget.slots, turns(budget, shard)
    size = jnp.sum(stored, dtype=jnp.int32)
    order, ahead, _ = arrivals(label, valid, budget.classes)
    # The rows that come first fill the shard, each in the slot behind the one before.
    slot = size + jnp.cumsum(valid, dtype=jnp.int32) - 1
    filling = valid & (slot < budget.room(shard))
    slot = jnp.where(filling, slot, slots)
    added = jnp.zeros_like(stored).at[label].add(filling.astype(jnp.int32))
    link, at, k = jnp.roll(slot[order], 1), slot[order], label[order]
    link = jnp.where(ahead[order] == 0, last[k], link)
    previous = previous.at[0, at].set(link, mode="drop")
    newest = (at < slots) & (ahead[order] + 1 == added[k])
    last = last.at[jnp.where(newest, k, budget.classes)].set(at, mode="drop")
    stored = stored + added
    # From here on the greatest height only falls: of each class no more rows can be stored than fit below it now.
    fit = (jnp.max(_heights(budget, turn, stored)) - 1 - turn) // budget.shards + 1 - stored
    rows, count = compacted(valid & ~filling & (ahead - added[label] < fit[label]))
    one = functools.partial(_take, budget, turn, rows, label)
    previous, last, stored, slot = lax.fori_loop(0, trips(count), one, (previous, last, stored, slot))
    return slot, {"previous": previous, "last": last[None], "stored": stored[None]}


def _heights(budget, turn, sizes):
    """Of the last row of each class, int32 `[K]`, negative where it has none."""
    return (sizes - 1) * budget.shards + turn


def _take(budget, turn, rows, label, step, carry):
    """One row of the batch for a full shard; beyond the last nothing."""
    previous, last, stored, slot = carry
    classes, slots, i = jnp.arange(budget.classes, dtype=jnp.int32), budget.slots, rows[step]
    c = label.at[i].get(mode="clip")
    height = _heights(budget, turn, stored)
    top = jnp.max(height)
    store = (i < label.shape[0]) & (height[c] + budget.shards < top)
    victim = jnp.max(jnp.where(height == top, classes, 0))
    at = jnp.where(store, last[victim], slots)
    # A write that holds what was read, of two entries, the second out of range: XLA turns other forms into a copy of
    # `previous` a row.
    pair = jnp.stack([at, jnp.full_like(at, slots + 1)])
    read = previous.at[0, pair].get(mode="clip")
    before = read[0]
    written = jnp.where(read < 0, read, last[c])
    previous = previous.at[0, pair].set(written, mode="drop", unique_indices=True)
    last = jnp.where(store & (classes == victim), before, last)
    last = jnp.where(store & (classes == c), at, last)
    stored = stored + store * ((classes == c).astype(jnp.int32) - (classes == victim))
    return previous, last, stored, slot.at[i].set(at, mode="drop")


def _size(budget, meta, shard):
    return jnp.sum(meta["stored"], dtype=jnp.int32)


def _without(budget, meta, gone, kept):
    previous, last, stored = (meta[name][0] for name in ("previous", "last", "stored"))
    slots = jnp.arange(budget.slots, dtype=jnp.int32)
    kept &= slots < jnp.sum(stored)
    source, _ = compacted(kept)
    place = jnp.cumsum(kept, dtype=jnp.int32) - 1  # of a row that stays
    previous = place[previous.at[source].get(mode="clip")]
    last, stored = jnp.where(gone, 0, place[last]), jnp.where(gone, 0, stored)
    return source, {"previous": previous[None], "last": last[None], "stored": stored[None]}


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
