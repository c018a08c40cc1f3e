"""The rehearsal buffer: a memory of past rows, sharded over devices, from which all draw without bias.

    buffer = make_buffer(record, capacity=2000, representatives=56, policy="reservoir", mesh=mesh)
    state = buffer.init()
    state = buffer.insert(state, rows, key)      # jit it, donate the state
    drawn = buffer.draw(state, key)              # after the insert: the other order copies the whole buffer

Idea: Bouvier et al., Efficient Data-Parallel Continual Learning with Asynchronous Distributed Rehearsal Buffers,
CCGrid 2024.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from jaxcl.buffer import draw as draw_lib
from jaxcl.buffer import exchange as exchange_lib
from jaxcl.buffer import repeats as repeats_lib
from jaxcl.buffer import shard as shard_lib
from jaxcl.buffer.exchange import EXCHANGES
from jaxcl.buffer.policy import POLICIES, make_policy
from jaxcl.buffer.repeats import REPEATS
from jaxcl.buffer.shard import Drawn, Rows, Shard
from jaxcl.errors import UserError
from jaxcl.mesh import AXIS

__all__ = [
    "DRAWS",
    "EXCHANGES",
    "MEMORIES",
    "POLICIES",
    "REPEATS",
    "Buffer",
    "Drawn",
    "Local",
    "Rows",
    "Shard",
    "make_buffer",
]

PyTree = Any
MEMORIES = ("sharded", "replicated", "independent")
DRAWS = ("uniform", "class_balanced")


@dataclasses.dataclass(frozen=True)
class Local:
    """The buffer's functions for use inside an existing `shard_map`, on this device's part of every argument."""

    insert: Callable[[Shard, Rows, jax.Array], Shard]
    draw: Callable[[Shard, jax.Array], Drawn]


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Pure functions over a state pytree, bound to their sizes. Make one with `make_buffer`.

    Attributes:
      init: `() -> state`, an empty buffer, already split over the mesh.
      insert: `(state, rows, key) -> state`. `rows` leaves are `[b, ...]` over all devices, split by rows. In place when
        the state is donated.
      draw: `(state, key) -> Drawn` of `representatives` rows, split by rows over the devices, without replacement; invalid
        where the memory holds fewer. Draws with different keys are independent: call it again for a second set.
      stats: `(state) -> dict` of plain numbers, see `make_stats`.
      no_rows: `() -> Drawn` without a valid row, the first value of double-buffered representatives.
      local: insert and draw for use inside `shard_map`.
      capacity: rows in the union of all shards; with `memory` "replicated" or "independent", rows on each device.
      representatives: rows of one draw over all devices.
      repeats: as given; a training step offers no row after a task's first epoch if it is "first_epoch".
      num_bytes: bytes of the whole state over all devices.
      traffic: rows and bytes that a device puts into collectives for one draw, padding included, and what r rows weigh.
    """

    init: Callable[[], Shard]
    insert: Callable[[Shard, Rows, jax.Array], Shard]
    draw: Callable[[Shard, jax.Array], Drawn]
    stats: Callable[[Shard], dict[str, Any]]
    no_rows: Callable[[], Drawn]
    local: Local
    capacity: int
    representatives: int
    repeats: str
    num_bytes: int
    traffic: dict[str, int]


def make_buffer(
    record: PyTree,
    *,
    capacity: int,
    representatives: int,
    policy: str = "reservoir",
    num_classes: int | None = None,
    accept: float | None = None,
    mesh: Mesh | None = None,
    memory: str = "sharded",
    exchange: str = "mix",
    sampling: str = "uniform",
    repeats: str = "all",
    num_ids: int | None = None,
) -> Buffer:
    """A rehearsal buffer.

    Args:
      record: one record as a pytree of arrays or `jax.ShapeDtypeStruct`, without the leading axis of rows.
      capacity: rows of the memory, at least one a device; what it counts is said by `memory`.
      representatives: rows of one draw over all devices, a multiple of the number of devices.
      policy: which row makes room for a new one, one of `POLICIES`.
      num_classes: static bound on the labels, for policies and draws by class.
      accept: probability with which `class_random` stores a row of a full class (the paper's c/b).
      mesh: devices to share the buffer along the axis `jaxcl.mesh.AXIS`; None keeps it on one device without collectives.
      memory: "sharded": the devices' shards together hold `capacity` rows, each device choosing among the rows it is given.
        "replicated": every device holds the same `capacity` rows. "independent": every device holds `capacity` rows of its
        own choice among the rows of all devices, so the union is up to N times as large and rows may be held twice (DyTox's
        "distributed memory").
      exchange: of a sharded memory. "mix": every device receives a uniform sample of the union. "balance": the same sample
        of the union, but drawn rows stay where they lie as far as possible. "local": every device draws from its own shard
        alone and nothing travels, which is another law: rows of small shards are replayed more often.
      sampling: "uniform": every stored row is equally likely. "class_balanced": every stored class has the same number of
        rows in a draw as far as it holds that many, and within a class every row is equally likely; needs a policy that
        keeps classes apart.
      repeats: "all": a row that comes again may be stored again. "distinct": a row whose id is stored is not stored again
        and not counted by the policy, so that the memory holds at most one copy of an id (an "independent" memory: one on
        each device); int32 a device and id. "first_epoch" is the training step's business and means "all" here.
      num_ids: of "distinct", a static bound on the ids: they lie in [0, num_ids).

    Raises:
      UserError: a size or name that is not allowed.
    """
    for field, value, allowed in (
        ("memory", memory, MEMORIES),
        ("exchange", exchange, EXCHANGES),
        ("sampling", sampling, DRAWS),
        ("repeats", repeats, REPEATS),
    ):
        if value not in allowed:
            raise UserError(f"buffer.{field}: {value!r} is unknown, choose one of {', '.join(allowed)}")
    if repeats == "distinct" and (num_ids is None or num_ids < 1):
        raise UserError(f"buffer.repeats: distinct needs num_ids, a positive number, got {num_ids}")
    shards = 1 if mesh is None else mesh.shape[AXIS]
    axis = None if mesh is None else AXIS
    if representatives < 1 or representatives % shards:
        raise UserError(
            f"buffer.representatives: {representatives} is not a positive multiple of the number of devices, {shards}"
        )
    per_device = representatives // shards
    parts = shards if memory == "sharded" else 1  # among how many the policy divides `capacity`
    rule = make_policy(policy, capacity=capacity, shards=parts, num_classes=num_classes, accept=accept)
    if sampling == "class_balanced" and rule.class_sizes is None:
        raise UserError(f"buffer.sampling: class_balanced needs a policy that keeps classes apart, {policy} does not")
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), record)
    alone = shards == 1 or memory == "independent" or exchange == "local"  # each device draws from what it holds
    routes = () if alone or memory == "replicated" else exchange_lib.make_routes(exchange, per_device, shards, AXIS)

    def device() -> jax.Array:
        return jnp.int32(0) if axis is None else lax.axis_index(axis).astype(jnp.int32)

    def part() -> jax.Array:
        """This device's number among those that divide `capacity`."""
        return device() if parts > 1 else jnp.int32(0)

    def init() -> Shard:
        state = shard_lib.empty(spec, rule.slots, rule.init(part()))
        if repeats != "distinct":
            return state
        return dataclasses.replace(state, slot_of=jnp.zeros((num_ids or 0,), jnp.int32))

    def insert(state: Shard, rows: Rows, key: jax.Array) -> Shard:
        if axis is not None and memory != "sharded":
            packed, unpack = exchange_lib.pack(rows)
            rows = unpack(lax.all_gather(packed, axis, tiled=True))
        # Devices that choose apart have keys apart; those that hold the same rows make the same choice.
        key = jax.random.fold_in(key, device() if memory == "independent" else part())
        if repeats == "distinct":
            rows = repeats_lib.distinct(state, rows, axis if memory == "sharded" else None)
        slot, meta = rule.choose(state.meta, key, part(), rows.label, rows.valid)
        slot = shard_lib.keep_last(slot, rule.slots)
        state = shard_lib.write(state, rows, slot, meta)
        if state.slot_of is None:
            return state
        return dataclasses.replace(state, slot_of=repeats_lib.remember(state.slot_of, rows.id, slot, rule.slots))

    def plan_draw(state: Shard, key: jax.Array, holders: str | None, count: int) -> draw_lib.Plan:
        """A plan over the shards along the axis `holders`, or over this device's rows alone."""

        def over(x: jax.Array) -> jax.Array:
            return x[None] if holders is None else lax.all_gather(x, holders)

        if sampling == "class_balanced" and rule.class_sizes is not None:
            return draw_lib.make_balanced_plan(key, over(rule.class_sizes(state.meta)), count)
        return draw_lib.make_plan(key, over(rule.size(state.meta, part())), count)

    def draw(state: Shard, key: jax.Array) -> Drawn:
        me = device()

        def read(rank: jax.Array) -> PyTree:
            return shard_lib.read(state, rule.locate(state.meta, part(), rank))

        if routes:
            plan = plan_draw(state, key, axis, representatives)
            (stored, label, ident), source, valid = exchange_lib.run(routes, plan, me, read)
        else:
            if alone:
                rank = plan_draw(state, key if shards == 1 else jax.random.fold_in(key, me), None, per_device).rank
            else:  # all hold the same rows: every device takes its share of one draw
                key, offset_key = jax.random.split(key)
                offset = jax.random.randint(offset_key, (), 0, shards)
                plan = plan_draw(state, key, None, representatives)
                rank = plan.rank[exchange_lib.dealt_to(me, offset, per_device, shards)]
            valid = rank != draw_lib.NONE
            stored, label, ident = jax.tree.map(lambda x: _zero_unless(valid, x), read(jnp.where(valid, rank, 0)))
            source = jnp.where(valid, me, -1)
        return Drawn(record=stored, label=label, id=jnp.where(valid, ident, -1), valid=valid, shard=source)

    def no_rows() -> Drawn:
        minus_one = jnp.full((per_device,), -1, jnp.int32)
        return Drawn(
            record=jax.tree.map(lambda s: jnp.zeros((per_device, *s.shape), s.dtype), spec),
            label=jnp.zeros((per_device,), jnp.int32),
            id=minus_one,
            valid=jnp.zeros((per_device,), bool),
            shard=minus_one,
        )

    def over_mesh(function: Callable, *, keyed: bool) -> Callable:
        """The function on global arrays: rows and state split over the mesh, the key known to all."""
        if mesh is None:
            return function
        split = PartitionSpec(AXIS)

        def call(*args: PyTree) -> PyTree:
            specs = (split,) * (len(args) - keyed) + (PartitionSpec(),) * keyed
            return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)(*args)

        return call

    state_bytes = _bytes(jax.eval_shape(over_mesh(init, keyed=False)))
    row_bytes = _bytes(spec) + 8
    moved = routes[0].rows_moved if routes else 0
    return Buffer(
        init=jax.jit(over_mesh(init, keyed=False)),
        insert=over_mesh(insert, keyed=True),
        draw=over_mesh(draw, keyed=True),
        stats=make_stats(shards, num_classes),
        no_rows=jax.jit(over_mesh(no_rows, keyed=False)),
        local=Local(insert=insert, draw=draw),
        capacity=capacity,
        representatives=representatives,
        repeats=repeats,
        num_bytes=state_bytes,
        traffic={
            "rows_needed": per_device,
            "rows_moved": moved,
            "row_bytes": row_bytes,
            "bytes_moved": moved * row_bytes,
        },
    )


def make_stats(shards: int, num_classes: int | None) -> Callable[[Shard], dict[str, Any]]:
    """`stats(state) -> dict` of plain numbers about what a buffer of `shards` shards holds.

    rows: stored rows over all devices, copies included; rows_per_shard; distinct_ids: different ids among them;
    overlap: of the rows of a shard, the share that a given other shard holds too, averaged over pairs of shards;
    class_histogram: stored rows of each class, where `num_classes` is known. Reads every slot's label and id on the host:
    for reports, not for every step. In a run of several processes all must call it.
    """

    def stats(state: Shard) -> dict[str, Any]:
        ids, label = (np.asarray(multihost_utils.process_allgather(x, tiled=True)) for x in (state.id, state.label))
        written = ids >= 0
        held = [np.unique(row[row >= 0]) for row in ids.reshape(shards, -1)]
        every = np.concatenate(held)
        # An id held by c shards makes c (c - 1) of the ordered pairs (row of a shard, other shard that holds it too).
        copies = np.unique(every, return_counts=True)[1].astype(np.int64)
        pairs = len(every) * (shards - 1)
        found = {
            "rows": int(written.sum()),
            "rows_per_shard": written.reshape(shards, -1).sum(axis=1).tolist(),
            "distinct_ids": len(copies),
            "overlap": float((copies * (copies - 1)).sum() / pairs) if pairs else 0.0,
        }
        if num_classes is not None:
            found["class_histogram"] = np.bincount(label[written], minlength=num_classes).tolist()
        return found

    return stats


def _zero_unless(valid: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def _bytes(tree: PyTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
