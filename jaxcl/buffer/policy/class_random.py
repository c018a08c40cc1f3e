"""One sub-buffer a class (Bouvier et al. 2024, section IV-B)."""

import jax.numpy as jnp
import numpy as np

from jaxcl.buffer import threefry as random
from jaxcl.buffer.policy.base import Budget, Moves, Policy, arrivals, bind, check_classes, int32, share
from jaxcl.check import Rule, check, refused


def class_random(budget: Budget) -> Policy:
    """Append while the class has room, then accept each row with probability `accept` (the paper's c/b) and overwrite a
    uniform row of its class.

    Class k owns the row numbers [first(k), first(k+1)) of the union, about capacity / K of them, and shard i keeps those
    congruent to i: with fewer rows a class than shards a class lives on some shards only, and its rows that arrive
    elsewhere are not stored.

    Raises:
      UserError: `num_classes` or `accept` is missing or out of range, or there are more classes than rows.
    """
    check_classes(budget, "class_random")
    if budget.capacity < budget.classes:
        allowed = f"at least {budget.classes}, a row for each of {budget.classes} classes"
        raise refused("buffer.capacity", budget.capacity, allowed)
    in_range = Rule(
        lambda x: x is not None and 0.0 < x <= 1.0,
        "a number in (0, 1], candidates / batch_size: the policy class_random needs it",
    )
    check("buffer.accept", budget.accept, in_range)
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


def _first(budget, shard, k):
    """The slot on `shard` at which the rows of class k begin; integers of JAX or NumPy."""
    quota, spare = divmod(budget.capacity, budget.classes)
    longer = k - (k > spare) * (k - spare)  # the classes before k that have one row more than the quota: min(k, spare)
    return share(shard, k * quota + longer, budget.shards)


def _init(budget, shard):
    return {"fill": jnp.zeros((1, budget.classes), jnp.int32)}


def _choose(budget, meta, key, shard, label, valid):
    fill, n = meta["fill"][0], label.shape[0]
    k = jnp.arange(budget.classes, dtype=jnp.int32)
    begin = _first(budget, shard, k)
    room = _first(budget, shard, k + 1) - begin
    _, ahead, came = arrivals(label, valid, budget.classes)
    number = fill[label] + ahead
    words = random.words(key, 2 * n)
    accepted = random.unit(words[0, :n]) < budget.accept
    anywhere = random.below(words[:, n:], jnp.maximum(room[label], 1))
    append = number < room[label]
    slot = begin[label] + jnp.where(append, number, anywhere)
    kept = valid & (append | accepted) & (room[label] > 0)
    return jnp.where(kept, slot, budget.slots), {"fill": jnp.minimum(fill + came, room)[None]}


def _locate(budget, meta, shard, rank):
    # Rank counts the stored rows class by class; each sub-buffer is filled from its beginning.
    until = jnp.cumsum(meta["fill"][0], dtype=jnp.int32)
    k = jnp.searchsorted(until, rank, side="right", method="scan_unrolled").astype(jnp.int32)
    k = jnp.minimum(k, budget.classes - 1)
    return _first(budget, shard, k) + rank - (until[k] - meta["fill"][0, k])


def _size(budget, meta, shard):
    return jnp.sum(meta["fill"], dtype=jnp.int32)


def _class_sizes(meta):
    return meta["fill"][0]


def _move(budget: Budget, meta: dict[str, np.ndarray], label: np.ndarray, old: int) -> Moves:
    """Each class is spread as evenly as its room on the shards allows, its odd rows where least is stored."""
    before = Budget(budget.capacity, old, budget.classes)
    bounds = np.arange(budget.classes + 1)  # the last begins where all end
    begin, begin_now = (_first(b, np.arange(b.shards)[:, None], bounds) for b in (before, budget))
    fill_now = np.zeros((budget.shards, budget.classes), np.int64)
    take, shard, slot = [], [], []
    for k in range(budget.classes):
        rows = [s * before.slots + begin[s, k] + np.arange(n) for s, n in enumerate(meta["fill"][:, k])]
        room = begin_now[:, k + 1] - begin_now[:, k]
        count = sum(map(len, rows))
        # Rooms differ by at most one: fill all to the level that the smallest has, then one more where there is room.
        fill = np.minimum(room, count // budget.shards)
        open_now = np.flatnonzero(fill < room)
        spare = open_now[np.argsort(fill_now[open_now].sum(axis=1), kind="stable")][: count - fill.sum()]
        fill[spare] += 1
        fill_now[:, k] = fill
        take.extend(rows)
        for m in range(budget.shards):
            shard.append(np.full(fill[m], m))
            slot.append(begin_now[m, k] + np.arange(fill[m]))
    return Moves(np.concatenate(take), np.concatenate(shard), np.concatenate(slot), int32(fill=fill_now))
