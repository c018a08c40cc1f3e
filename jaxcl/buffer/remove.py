"""What a memory holds, and what it shall hold no longer: rows chosen by a question, and rows removed by their ids.

A removed row leaves an empty place: zeros and the id -1. The policy fills it as it fills any slot, and a draw that picks it has
an invalid row there. So whatever the policy, the rows that stay are stored and drawn by the laws that held before: as if the
row were still there but nobody could see it. That costs an insert and a draw nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import bits, class_rows, weights
from jaxcl.buffer.buffer import Sizes
from jaxcl.buffer.held import Memory, decoded, pieces, rows_at_once
from jaxcl.buffer.host.messages import Asked, Pending
from jaxcl.buffer.policy.base import INT32_MAX
from jaxcl.buffer.shard import Drawn, Rows, Shard
from jaxcl.check import refused
from jaxcl.errors import UserError
from jaxcl.types import PyTree

Predicate = Callable[[PyTree, np.ndarray, np.ndarray], Any]


def select(memory: Memory, state: Shard, predicate: Predicate) -> Rows:
    """The stored rows for which a question is answered with yes.

    Beside what is found, a few megabytes of rows are on the host at once. In a run of several processes each gets the rows of
    its own shards; together they are all. A row of a replicated memory is found once, one of independent memories as often as
    it is held.

    Args:
      predicate: `(record, label, id) -> bool [n]`; leaves of the record `[n, ...]`, label and id int32 `[n]`, NumPy arrays
        (keys of `jax.random`: JAX ones). Called for some rows at a time.

    Returns:
      NumPy arrays (keys: JAX ones), ordered by shard and slot; they can be inserted again.

    Raises:
      UserError: the predicate answers with anything else.
    """
    record, form = jax.tree.flatten(memory.sizes.record)
    n = len(record)
    fields = (*jax.tree.leaves(memory.sizes.stored), *_FIELDS[: 3 if memory.sizes.weighted else 2])
    found = [[np.zeros((0, *s.shape), s.dtype) for s in fields]]
    for shard in memory.shards(state).values():
        leaves = [*jax.tree.leaves(shard.record), shard.label, shard.id]
        leaves += [] if shard.weights is None else [shard.weights.levels[0]]
        at_once = rows_at_once(*leaves)
        for some in zip(*(pieces(x, at_once) for x in leaves), strict=True):
            there = some[n + 1] >= 0
            if not there.any():
                continue
            rows = [x[there] for x in some]
            label, ident = rows[n : n + 2]
            seen = [decoded(s, x) for s, x in zip(record, rows[:n], strict=True)]
            wanted = np.asarray(predicate(jax.tree.unflatten(form, seen), label, ident))
            if wanted.shape != ident.shape or wanted.dtype != np.bool_:
                given = f"{wanted.dtype} {list(wanted.shape)}"
                raise UserError(f"predicate: {given} is not allowed as its answer, give bool [{len(ident)}]")
            found.append([x[wanted] for x in rows])
    every = [np.concatenate(x) for x in zip(*found, strict=True)]
    whole = jax.tree.unflatten(form, [decoded(s, x) for s, x in zip(record, every[:n], strict=True)])
    label, ident, *weight = every[n:]
    return Rows(whole, label, ident, np.ones(ident.shape, bool), weight=weight[0] if weight else None)


_FIELDS = (*(jax.ShapeDtypeStruct((), jnp.int32),) * 2, jax.ShapeDtypeStruct((), jnp.float32))  # label, id, weight


def remove(memory: Memory, erase: Callable[[Shard, Any], Shard], state: Shard, ids: Any) -> Shard:
    """The state without the rows of these ids, in memory zeroed; `state` is donated. O(capacity), once.

    Gone are their records, ids and, unless the policy chooses by class, labels, from all devices, from host memory and the
    files of `path`. What waits elsewhere has to be forgotten too: draws by `forget`, folders of `save` and checkpoints by being
    written anew. A row that is given again is stored again. In a run of several processes all must call it.

    Args:
      ids: integers `[n]`, on the host; those that are not stored do no harm.

    Raises:
      UserError: the ids are no integers `[n]`, or the host tier's writer is at work.
    """
    wanted = _ids(ids)
    if memory.host is not None:
        ids_of = memory.parts(state.id, replicas=True)
        memory.host.erase({n: np.flatnonzero(np.isin(np.asarray(x), wanted[wanted >= 0])) for n, x in ids_of.items()})
    return erase(state, wanted if memory.mesh is None else mesh_lib.replicate(memory.mesh, wanted))


def erase(sizes: Sizes, state: Shard, ids: jax.Array) -> Shard:
    """This device's shard without the rows of these ids, int32 `[n]`, ascending, negative ones to spare."""
    gone = _among(state.id, ids)
    slot_of, tree, slots = state.slot_of, state.weights, len(state.id)
    if tree is not None:
        number = jnp.arange(slots, dtype=jnp.int32)
        tree = weights.put(tree, jnp.where(gone, number, slots + number), jnp.zeros((slots,), jnp.float32))
    return dataclasses.replace(
        state,
        record=jax.tree.map(functools.partial(_zero, gone), state.record),
        # Of a policy that chooses by class the place stays one of its class, as it is counted.
        label=_zero(gone, state.label) if sizes.policy.classes is None else state.label,
        id=jnp.where(gone, -1, state.id),
        slot_of=None if slot_of is None else slot_of.at[jnp.where(ids < 0, INT32_MAX, ids)].set(0, mode="drop"),
        weights=tree,
        class_rows=None if state.class_rows is None else class_rows.without(state, gone),
    )


def drop_classes(sizes: Sizes, state: Shard, gone: jax.Array) -> Shard:
    """This device's shard without the rows of the classes `gone`, bool `[K]`, whose places are free for other classes. What is
    left keeps its order, as the policy knows it. O(capacity), once.

    Raises:
      UserError: the policy cannot give up a class.
    """
    without = sizes.policy.without
    if without is None:
        raise refused("buffer.policy", "this one", "herding, which can give up classes")
    slots = len(state.id)
    source, meta = without(state.meta, gone, ~gone[state.label])
    there, place = source < slots, jnp.arange(slots, dtype=jnp.int32)

    def moved(leaf: jax.Array) -> jax.Array:
        return leaf.at[source].get(mode="fill", fill_value=0)

    ident = jnp.where(there, moved(state.id), -1)
    slot_of, tree = state.slot_of, state.weights
    if slot_of is not None:
        known = jnp.where(ident < 0, INT32_MAX, ident)
        slot_of = jnp.zeros_like(slot_of).at[known].set(place, mode="drop")
    if tree is not None:
        none = dataclasses.replace(weights.empty(slots), greatest=tree.greatest)
        tree = weights.put(none, jnp.where(there, place, slots + place), moved(tree.levels[0]))
    return dataclasses.replace(
        state,
        record=jax.tree.map(moved, state.record),
        label=moved(state.label),
        id=ident,
        meta=meta,
        slot_of=slot_of,
        weights=tree,
        class_rows=None if state.class_rows is None else jnp.where(gone, 0, state.class_rows),
    )


def forget(staged: PyTree, ids: Any) -> PyTree:
    """Draws that wait to be used, without the rows of these ids: these are zeros and invalid. `staged` is donated.

    Of a draw of windows nothing is left, as nobody knows the ids of the rows that follow the first ones.

    Args:
      staged: `Drawn` or what the host tier leaves for the next step, or a pytree of them.
      ids: as of `remove`.

    Raises:
      UserError: a draw that is not collected yet.
    """
    for one in jax.tree.leaves(staged):
        if isinstance(one, Asked):
            raise UserError("staged: a draw that is still asked for is not allowed, give what `collect` returns")
    return _forget(staged, _ids(ids))


@functools.partial(jax.jit, donate_argnums=0)
def _forget(staged: PyTree, ids: jax.Array) -> PyTree:
    return jax.tree.map(lambda one: _without(one, ids), staged, is_leaf=lambda x: isinstance(x, Drawn | Pending))


def _without(staged: Drawn | Pending, ids: jax.Array) -> Drawn | Pending:
    gone = _among(staged.id, ids)
    if isinstance(staged, Pending):  # its records come from the memory, or from nowhere
        return dataclasses.replace(staged, label=_zero(gone, staged.label), id=jnp.where(gone, -1, staged.id))
    if staged.length is not None:
        gone = jnp.ones_like(gone)
    zeros = jax.tree.map(functools.partial(_zero, gone), staged)
    return dataclasses.replace(zeros, id=jnp.where(gone, -1, staged.id), shard=jnp.where(gone, -1, staged.shard))


def _zero(gone: jax.Array, leaf: jax.Array) -> jax.Array:
    """A leaf `[n, ...]` with zeros in these rows, by its bits."""
    stored = bits.to_bits(leaf)
    mask = gone.reshape(-1, *[1] * (stored.ndim - 1))
    zeroed = jnp.where(mask, jnp.zeros((), stored.dtype), stored)
    return bits.from_bits(jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), zeroed)


def _among(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Which of `x` (int32 `[n]`) are among these ids, ascending; no negative ones."""
    at = jnp.searchsorted(ids, x, method="scan_unrolled")
    return (x >= 0) & (ids.at[at].get(mode="clip") == x)


def _ids(ids: Any) -> np.ndarray:
    """Those that can be stored, int32, ascending, with -1 before them so that few programs are compiled for many numbers."""
    ids = np.asarray(ids)
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
        raise UserError(f"ids: {ids.dtype} {list(ids.shape)} is not allowed, give integers [n]")
    known = np.unique(ids[(ids >= 0) & (ids <= INT32_MAX)]).astype(np.int32)
    spare = 2 ** max(4, (len(known) - 1).bit_length()) - len(known)
    return np.concatenate([np.full(spare, -1, np.int32), known])
