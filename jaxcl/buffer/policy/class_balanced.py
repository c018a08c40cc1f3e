"""Class-balancing reservoir sampling of each shard's own stream (Chrysakis & Moens 2020, algorithm 1)."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.buffer import threefry as random
from jaxcl.buffer.policy.base import (
    INT32_MAX,
    Budget,
    Moves,
    Policy,
    arrivals,
    bind,
    check_classes,
    compacted,
    deal_by_class,
    dealt,
    int32,
    trips,
    turns,
)


def class_balanced(budget: Budget) -> Policy:
    """Until the shard is full every row is stored. Then, with m rows of its class stored out of the n that came, itself
    included: if the shard still holds all earlier rows of the class and another class is larger, the row replaces a uniform
    row among those of the largest classes; otherwise it replaces a uniform row of its own class with probability m / n.
    (The paper marks a class "full" once it was largest. Sizes of the largest class never grow in a full shard, so that is
    the class which is largest or has lost a row, and needs no mark.)

    Laws, of each shard:
      - The rows stored of a class are a uniform sample without replacement of those of its stream.
      - Once the shard is full its division is max-min fair: with M rows in the largest class, every class holds M or M - 1
        rows or all that came. A class that appears takes rows from the largest ones, one for one.
    Which classes have the M-th row is the shards' turn (`turns`): "larger" and "largest" compare heights of top rows.
    Of the union, while each of the k classes 0..k-1 comes to every full shard at least M times: if N divides k, sizes of
    classes differ by at most one row; if k > N, by two, by three from 12 shards on (all k and capacities tried, N up
    to 32); if k < N, by N / 2. A class that comes to one device only fills no more than its part of that shard.

    Slots are kept in the order of their rows' classes (`order`: class 0, class 1, ..., free), so that a uniform row of a
    class is one look-up. A slot changes class by moving one entry of each class in between: O(K) a row, in a loop over the
    rows that can be stored, up to the last one whose class can grow. The others are placed at once; where no class grows
    (the shard is full, no class new) those are all. n saturates at 2**31 - 2.

    Raises:
      UserError: `num_classes` is missing.
    """
    check_classes(budget, "class_balanced")
    return bind(
        budget,
        classes=budget.classes,
        init=_init,
        choose=_choose,
        locate=_locate,
        size=_size,
        class_sizes=_class_sizes,
        move=_move,
    )


def _init(budget, shard):
    stored = jnp.zeros((1, budget.classes + 1), jnp.int32).at[0, budget.classes].set(budget.room(shard))
    order = jnp.arange(budget.slots, dtype=jnp.int32)[None]
    return {"order": order, "stored": stored, "seen": jnp.zeros((1, budget.classes), jnp.int32)}


def _choose(budget, meta, key, shard, label, valid):
    # `order` keeps its axis of one: under vmap XLA copies all of it to put the axis back.
    order, stored, seen = meta["order"], meta["stored"][0], meta["seen"][0]
    n, slots, turn = label.shape[0], budget.slots, turns(budget, shard)
    position = jnp.arange(n, dtype=jnp.int32)
    words = random.words(key, 2 * n)
    _, ahead, came = arrivals(label, valid, budget.classes)
    before = seen[label] + jnp.minimum(ahead, INT32_MAX - 1 - seen[label])
    drawn = random.below(words[:, :n], before + 1)  # below m with probability m / n, and then uniform
    # The greatest height rises as long as slots are free, then it only falls: a class never gets a row beyond `last`.
    filling = valid & (jnp.cumsum(valid, dtype=jnp.int32) <= stored[-1])
    filled = stored[:-1].at[label].add(filling.astype(jnp.int32))
    last = ((jnp.max(_heights(budget, turn, filled)) - turn) // budget.shards)[label]
    may_grow = filling | (valid & (stored == jnp.append(seen, 0))[label] & (before <= last))
    end = jnp.max(jnp.where(may_grow, position + 1, 0))
    rows, count = compacted(valid & (position < end) & (filling | (drawn <= last)))
    one = functools.partial(_take, budget, turn, rows, label, before, drawn, words[:, n:])
    carry = order, stored, jnp.full_like(label, slots)
    order, stored, slot = lax.fori_loop(0, trips(count), one, carry)
    # From here on no class grows, sizes stay as they are, and all rows are placed at once.
    at_once = order.at[0, (jnp.cumsum(stored, dtype=jnp.int32) - stored)[label] + drawn].get(mode="clip")
    at_once = jnp.where(valid & (drawn < stored[label]), at_once, slots)
    seen = seen + jnp.minimum(came, INT32_MAX - 1 - seen)
    slot = jnp.where(position < end, slot, at_once)
    return slot, {"order": order, "stored": stored[None], "seen": seen[None]}


def _heights(budget, turn, sizes):
    """Of the top row of each class, int32 `[K]`, negative where it has none."""
    return (sizes - 1) * budget.shards + turn


def _take(budget, turn, rows, label, before, drawn, words, step, carry):
    """One row of the batch; beyond the last nothing."""
    order, stored, slot = carry
    slots, free, i = budget.slots, budget.classes, rows[step]
    valid, i = i < label.shape[0], jnp.minimum(i, label.shape[0] - 1)
    classes = jnp.arange(free + 1, dtype=jnp.int32)
    c = label[i]
    height = _heights(budget, turn, stored[:free])
    top = jnp.max(height)
    room = (stored[c] == before[i]) & (height[c] + budget.shards <= top)
    grow = valid & ((stored[free] > 0) | room)
    highest, size = height == top, jnp.maximum(top // budget.shards + 1, 1)
    pick = random.below(words[:, i], jnp.maximum(jnp.sum(highest, dtype=jnp.int32), 1) * size)
    victim = jnp.argmax(jnp.cumsum(highest, dtype=jnp.int32) > pick // size).astype(jnp.int32)
    victim, rank = jnp.where(stored[free] > 0, free, victim), jnp.where(stored[free] > 0, 0, pick % size)
    begin = jnp.cumsum(stored, dtype=jnp.int32) - stored
    end = begin + stored
    at = jnp.where(grow, begin[victim] + rank, begin[c] + jnp.minimum(drawn[i], stored[c] - 1))
    # The victim's entry nearest to c fills the gap; each class in between moves its near end to its far end.
    down = victim > c
    between = ((classes > c) & (classes < victim)) | ((classes < c) & (classes > victim))
    near = jnp.where(down, begin, end - 1)
    far = jnp.where(down, end, begin - 1)
    far = jnp.where(classes == victim, at, far)
    moved = (between & (stored > 0)) | (classes == c) | ((classes == victim) & (near != at))
    # One read, on which the write depends: XLA would otherwise copy `order`.
    entry = order.at[0, jnp.append(near, at)].get(mode="clip")
    taken = entry[-1]
    order = order.at[0, jnp.where(grow & moved, far, slots + classes)].set(
        jnp.where(classes == c, taken, entry[:-1]), mode="drop", unique_indices=True
    )
    kept = grow | (drawn[i] < stored[c])
    change = grow * ((classes == c).astype(jnp.int32) - (classes == victim))
    return order, stored + change, slot.at[i].set(jnp.where(valid & kept, taken, slot[i]))


def _locate(budget, meta, shard, rank):
    return meta["order"][0].at[rank].get(mode="clip")


def _size(budget, meta, shard):
    return jnp.sum(meta["stored"][0, : budget.classes], dtype=jnp.int32)


def _class_sizes(meta):
    return meta["stored"][0, :-1]


def _move(budget: Budget, meta: dict[str, np.ndarray], label: np.ndarray, old: int) -> Moves:
    """What a class has lost is counted on the shards that hold some of it, so that the others may still take its rows."""
    before, k = Budget(budget.capacity, old), budget.classes
    held = meta["stored"][:, :k].sum(axis=1)
    rows = [s * before.slots + meta["order"][s, :n] for s, n in enumerate(held)]
    take, shard, slot, stored = deal_by_class(budget, np.concatenate(rows).astype(np.int64), label)
    seen = stored.copy()
    lost = meta["seen"].sum(axis=0, dtype=np.int64) - stored.sum(axis=0)
    for c in range(k):
        holders = np.flatnonzero(stored[:, c])
        if len(holders):
            seen[holders, c] += dealt(int(lost[c]), len(holders))
    free = budget.rooms() - stored.sum(axis=1)
    return Moves(
        take,
        shard,
        slot,
        int32(
            order=np.tile(np.arange(budget.slots), (budget.shards, 1)),
            stored=np.concatenate([stored, free[:, None]], axis=1),
            seen=np.minimum(seen, INT32_MAX - 1),
        ),
    )
