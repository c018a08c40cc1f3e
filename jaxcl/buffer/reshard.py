"""A stored buffer on another number of devices: every row survives exactly once, and the shards are balanced again.

Done once, at the start of a continued run, with NumPy on the host. Only here is it known how each policy's metadata describes
its rows, so that this file and `policy/` must be changed together: a policy is one function, `(meta, label, sizes) -> Moves`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxcl.buffer.shard import Shard
from jaxcl.errors import UserError

Meta = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the old and the new sharding; the capacity is one."""

    capacity: int
    old: int
    new: int
    num_classes: int

    def slots(self, shards: int) -> int:
        return -(-self.capacity // shards)

    def room(self, shards: int) -> np.ndarray:
        """Rows each of `shards` shards may hold, int64 `[shards]`: number g of the union belongs to shard g mod shards."""
        return _dealt(self.capacity, shards)


@dataclasses.dataclass(frozen=True)
class Moves:
    """Which rows go where.

    Attributes:
      take: int64 `[T]`, the old slot of every stored row, counted over all old shards.
      shard, slot: int64 `[T]`, the new shard of each and its slot there.
      meta: the policy's metadata of the new shards, leaves `[new, ...]`.
    """

    take: np.ndarray
    shard: np.ndarray
    slot: np.ndarray
    meta: Meta


def reshard(
    state: Shard, *, policy: str, capacity: int, num_classes: int, old: int, new: int, memory: str = "sharded"
) -> Shard:
    """The state of a buffer on `old` devices as one on `new` devices.

    Args:
      state: global NumPy arrays, leaves `[old * slots, ...]`, metadata `[old, ...]`. A record may be anything of each slot.
      policy, capacity, num_classes, memory: as given to `make_buffer`.

    Returns:
      Global NumPy arrays of a state that the same buffer on `new` devices might have.

    Raises:
      UserError: the memory is "independent", whose size is by definition another on another number of devices.
    """
    if memory == "independent":
        raise UserError(
            f"buffer.memory: independent grows with the devices, so a run of {old} devices cannot go on with {new}; give {old}"
        )
    if memory == "replicated":
        return jax.tree.map(lambda x: np.concatenate([np.asarray(x)[: len(x) // old]] * new), state)
    sizes = Sizes(capacity, old, new, num_classes)
    moves = MOVES[policy](state.meta, np.asarray(state.label), sizes)
    to = moves.shard * sizes.slots(new) + moves.slot

    def move(stored: Any, empty: int = 0) -> Any:
        out = np.full((new * sizes.slots(new), *stored.shape[1:]), empty, stored.dtype)
        out[to] = np.asarray(stored)[moves.take]
        return out

    slot_of: Any = None
    if state.slot_of is not None:
        slot_of = np.zeros((new, len(state.slot_of) // old), np.int32)
        slot_of[moves.shard, np.asarray(state.id)[moves.take]] = moves.slot
        slot_of = slot_of.reshape(-1)
    record = jax.tree.map(move, state.record)
    return Shard(record, move(state.label), move(state.id, empty=-1), moves.meta, slot_of)


def _dealt(rows: int, shards: int) -> np.ndarray:
    """How many of `rows` rows each shard gets, dealt round-robin; int64 `[shards]`."""
    return (rows - np.arange(shards) + shards - 1) // shards


def _merge(lists: list[np.ndarray], *, align_ends: bool = False) -> np.ndarray:
    """One list of several, place by place: all first entries, all second ones, ... or, with `align_ends`, all last ones
    last."""
    place = np.concatenate([np.arange(len(x)) - (len(x) if align_ends else 0) for x in lists])
    return np.concatenate(lists)[np.argsort(place, kind="stable")]


def _reservoir(meta: Meta, label: np.ndarray, sizes: Sizes) -> Moves:
    """Shards stay reservoirs of about equal streams: what all have seen is dealt out like the rows. Only rows seen by shards
    that were full while others were not cannot all be counted, as a shard with room must have stored all it has seen."""
    seen = meta["seen"].astype(np.int64)
    stored = np.minimum(seen, sizes.room(sizes.old))
    take = _merge([s * sizes.slots(sizes.old) + np.arange(n) for s, n in enumerate(stored)])
    fill = _dealt(len(take), sizes.new)
    full = fill == sizes.room(sizes.new)
    seen_now = fill.copy()
    if full.any():
        seen_now[full] += _dealt(int(seen.sum() - stored.sum()), int(full.sum()))
    row = np.arange(len(take))
    seen_now = np.minimum(seen_now, np.iinfo(np.int32).max - 1)
    return Moves(take, row % sizes.new, row // sizes.new, {"seen": seen_now.astype(np.int32)})


def _fifo(meta: Meta, label: np.ndarray, sizes: Sizes) -> Moves:
    """Rings, oldest rows first; rows of one age go to different shards."""
    rings = []
    for s, (after, fill, room) in enumerate(zip(meta["next"], meta["fill"], sizes.room(sizes.old), strict=True)):
        rings.append(s * sizes.slots(sizes.old) + (after - fill + np.arange(fill)) % room)
    take = _merge(rings, align_ends=True)
    fill = _dealt(len(take), sizes.new)
    row = np.arange(len(take))
    now = {"next": fill % sizes.room(sizes.new), "fill": fill}
    return Moves(take, row % sizes.new, row // sizes.new, {name: x.astype(np.int32) for name, x in now.items()})


def _class_random(meta: Meta, label: np.ndarray, sizes: Sizes) -> Moves:
    """Sub-buffers: each class is spread as evenly as its room on the shards allows, its odd rows where least is stored."""

    def first(shards: int) -> np.ndarray:
        """The slot at which each class begins on each shard, int64 `[shards, K + 1]`."""
        k = np.arange(sizes.num_classes + 1)
        quota, spare = divmod(sizes.capacity, sizes.num_classes)
        number = k * quota + np.minimum(k, spare)
        return (number[None, :] - np.arange(shards)[:, None] + shards - 1) // shards

    begin, begin_now = first(sizes.old), first(sizes.new)
    fill_now = np.zeros((sizes.new, sizes.num_classes), np.int64)
    take, shard, slot = [], [], []
    for k in range(sizes.num_classes):
        rows = [s * sizes.slots(sizes.old) + begin[s, k] + np.arange(n) for s, n in enumerate(meta["fill"][:, k])]
        room = begin_now[:, k + 1] - begin_now[:, k]
        count = sum(map(len, rows))
        # Rooms differ by at most one: fill all to the level that the smallest has, then one more where there is room.
        fill = np.minimum(room, count // sizes.new)
        open_now = np.flatnonzero(fill < room)
        spare = open_now[np.argsort(fill_now[open_now].sum(axis=1), kind="stable")][: count - fill.sum()]
        fill[spare] += 1
        fill_now[:, k] = fill
        take.extend(rows)
        for m in range(sizes.new):
            shard.append(np.full(fill[m], m))
            slot.append(begin_now[m, k] + np.arange(fill[m]))
    meta = {"fill": fill_now.astype(np.int32)}
    return Moves(np.concatenate(take), np.concatenate(shard), np.concatenate(slot), meta)


def _by_class(
    take: np.ndarray, label: np.ndarray, sizes: Sizes
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Deals rows round-robin class after class, so that classes and shards are balanced to within one row.

    Returns:
      take sorted by class, the shard and the slot of each row, and rows of each class on each shard, `[new, K]`.
    """
    take = take[np.argsort(label[take], kind="stable")]
    row = np.arange(len(take))
    shard = row % sizes.new
    stored = np.zeros((sizes.new, sizes.num_classes), np.int64)
    np.add.at(stored, (shard, label[take]), 1)
    return take, shard, row // sizes.new, stored


def _class_balanced(meta: Meta, label: np.ndarray, sizes: Sizes) -> Moves:
    """What a class has lost is counted on the shards that hold some of it, so that the others may still take its rows."""
    slots, k = sizes.slots(sizes.new), sizes.num_classes
    held = meta["stored"][:, :k].sum(axis=1)
    rows = [s * sizes.slots(sizes.old) + meta["order"][s, :n] for s, n in enumerate(held)]
    take, shard, slot, stored = _by_class(np.concatenate(rows).astype(np.int64), label, sizes)
    seen = stored.copy()
    lost = meta["seen"].sum(axis=0, dtype=np.int64) - stored.sum(axis=0)
    for c in range(k):
        holders = np.flatnonzero(stored[:, c])
        if len(holders):
            seen[holders, c] += _dealt(int(lost[c]), len(holders))
    seen = np.minimum(seen, np.iinfo(np.int32).max - 1)
    free = sizes.room(sizes.new) - stored.sum(axis=1)
    now = {
        "order": np.tile(np.arange(slots), (sizes.new, 1)),
        "stored": np.concatenate([stored, free[:, None]], axis=1),
        "seen": seen,
    }
    return Moves(take, shard, slot, {name: x.astype(np.int32) for name, x in now.items()})


def _herding(meta: Meta, label: np.ndarray, sizes: Sizes) -> Moves:
    """Lists by rank: the best rows of all old shards come first in the new ones."""
    rows = []
    for k in range(sizes.num_classes):
        ranked = []
        for s, (last, stored) in enumerate(zip(meta["last"][:, k], meta["stored"][:, k], strict=True)):
            slot, back = last, []
            for _ in range(stored):
                back.append(s * sizes.slots(sizes.old) + int(slot))
                slot = meta["previous"][s, slot]
            ranked.append(np.array(back[::-1], np.int64))
        rows.append(_merge(ranked))
    take, shard, slot, stored = _by_class(np.concatenate(rows), label, sizes)
    previous = np.zeros((sizes.new, sizes.slots(sizes.new)), np.int32)
    last = np.zeros((sizes.new, sizes.num_classes), np.int32)
    for m, at, k in zip(shard, slot, label[take], strict=True):
        previous[m, at], last[m, k] = last[m, k], at
    return Moves(take, shard, slot, {"previous": previous, "last": last, "stored": stored.astype(np.int32)})


MOVES: dict[str, Callable[[Any, np.ndarray, Sizes], Moves]] = {
    "reservoir": _reservoir,
    "fifo": _fifo,
    "class_random": _class_random,
    "class_balanced": _class_balanced,
    "herding": _herding,
}
