"""The rehearsal buffer: a memory of past rows, sharded over devices, from which all draw without bias.

    buffer = make_buffer(record, capacity=2000, representatives=56, policy="reservoir", mesh=mesh)
    state = buffer.init()
    state = buffer.insert(state, rows, key)      # jit it, donate the state
    drawn = buffer.draw(state, key)              # after the insert: the other order copies the whole buffer

Idea: Bouvier et al., Efficient Data-Parallel Continual Learning with Asynchronous Distributed Rehearsal Buffers,
CCGrid 2024.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from jaxcl.buffer import draw as draw_lib
from jaxcl.buffer import exchange as exchange_lib
from jaxcl.buffer import host as host_lib
from jaxcl.buffer import repeats as repeats_lib
from jaxcl.buffer import shard as shard_lib
from jaxcl.buffer import threefry as random
from jaxcl.buffer.exchange import EXCHANGES
from jaxcl.buffer.host import HANDOVERS, TIERS, Handover, Pending, Store
from jaxcl.buffer.policy import POLICIES, make_policy
from jaxcl.buffer.repeats import REPEATS
from jaxcl.buffer.shard import Drawn, Rows, Shard
from jaxcl.errors import UserError
from jaxcl.mesh import AXIS
from jaxcl.types import PyTree

__all__ = [
    "DRAWS",
    "EXCHANGES",
    "HANDOVERS",
    "MEMORIES",
    "POLICIES",
    "REPEATS",
    "TIERS",
    "Buffer",
    "Drawn",
    "Local",
    "Rows",
    "Shard",
    "Staged",
    "make_buffer",
]

MEMORIES = ("sharded", "replicated", "independent")
DRAWS = ("uniform", "class_balanced")
Staged = tuple[Any, ...]  # of Drawn, in the host tier of Pending


@dataclasses.dataclass(frozen=True)
class Local:
    """The buffer's functions for use inside an existing `shard_map`, on this device's part of every argument.

    A training step uses `turn` and `receive`, which are the same for both tiers.

    Attributes:
      insert, draw: as those of `Buffer`; of the device tier alone.
      keep: as insert, but a device stores of the rows it is given alone, whatever the memory; for a "replicated" one give
        all devices the same.
      turn: `(state, rows, insert_key, draw_keys, step) -> (state, staged, handover)`: an insert, then a draw for each key.
        `staged` goes to `receive` in the next step. In the host tier `step` is the number of the step, one more each time,
        and `handover` goes to `Store.passed`; it is () in the device tier.
      receive: `(staged, arrived) -> tuple of Drawn`; in the host tier `arrived` is what `Store.take` gives.
    """

    insert: Callable[[Shard, Rows, jax.Array], Shard]
    keep: Callable[[Shard, Rows, jax.Array], Shard]
    draw: Callable[[Shard, jax.Array], Drawn]
    turn: Callable[..., tuple[Shard, Staged, Handover | tuple[()]]]
    receive: Callable[[Staged, jax.Array | None], tuple[Drawn, ...]]


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Pure functions over a state pytree, bound to their sizes. Make one with `make_buffer`.

    Attributes:
      init: `() -> state`, an empty buffer, already split over the mesh.
      insert: `(state, rows, key) -> state`. `rows` leaves are `[b, ...]` over all devices, split by rows. In place when
        the state is donated.
      draw: `(state, key) -> Drawn` of `representatives` rows, split by rows over the devices, without replacement; invalid
        where the memory holds fewer. Draws with different keys are independent: call it again for a second set.
      stage: `(state, keys) -> Staged`, a draw for each key, as a training step leaves it for the next one.
      stats: `(state) -> dict` of plain numbers, see `make_stats`.
      no_rows: `() -> Drawn` (host tier: `Pending`) without a valid row, the first value of double-buffered representatives.
      local: insert and draw for use inside `shard_map`.
      capacity: rows in the union of all shards; with `memory` "replicated" or "independent", rows on each device.
      representatives: rows of one draw over all devices.
      repeats: as given; a training step offers no row after a task's first epoch if it is "first_epoch".
      num_bytes: bytes of the whole state over all devices, the rows in host memory included.
      traffic: rows and bytes that a device puts into collectives for one draw, padding included, and what r rows weigh.
      host: the rows in host memory; None in the device tier.
    """

    init: Callable[[], Shard]
    insert: Callable[[Shard, Rows, jax.Array], Shard]
    draw: Callable[[Shard, jax.Array], Drawn]
    stage: Callable[[Shard, Sequence[jax.Array]], Staged]
    stats: Callable[[Shard], dict[str, Any]]
    no_rows: Callable[[], Drawn | Pending]
    local: Local
    capacity: int
    representatives: int
    repeats: str
    num_bytes: int
    traffic: dict[str, int]
    host: Store | None


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
    tier: str = "device",
    path: str | None = None,
    handover: str = "outputs",
    queue: int = 4,
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
      tier: where records lie: "device", or "host", in host memory, see `host.py`; with the same keys both store and draw the
        same rows. A buffer of the host tier owns its rows: it serves one state, which only `turn` and `receive` move.
      path: of the host tier, a folder for memory-mapped files, so that the memory may be larger than RAM.
      handover: of the host tier, how rows leave the step: as its "outputs" or by "callback".
      queue: of the host tier, how many steps' rows may wait to be stored.

    Raises:
      UserError: a size or name that is not allowed.
    """
    for field, value, allowed in (
        ("memory", memory, MEMORIES),
        ("exchange", exchange, EXCHANGES),
        ("sampling", sampling, DRAWS),
        ("repeats", repeats, REPEATS),
        ("tier", tier, TIERS),
        ("handover", handover, HANDOVERS),
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

    store = None
    if tier == "host":
        if mesh is None:
            raise UserError("buffer.tier: host needs a mesh, which may be one of one device")
        # A device has to send what its shard supplies: r rows on average, so that this almost always suffices.
        narrow = min(exchange_lib.six_sigma(per_device, 1), representatives) if routes else per_device
        store = host_lib.Store(spec, rule.slots, narrow, mesh, path, queue)

    on_cpu = mesh is not None and mesh.devices.flat[0].platform == "cpu"

    def device() -> jax.Array:
        return jnp.int32(0) if axis is None else lax.axis_index(axis).astype(jnp.int32)

    def part() -> jax.Array:
        """This device's number among those that divide `capacity`."""
        return device() if parts > 1 else jnp.int32(0)

    def init() -> Shard:
        state = shard_lib.empty({} if store else spec, rule.slots, rule.init(part()))
        if repeats != "distinct":
            return state
        return dataclasses.replace(state, slot_of=jnp.zeros((num_ids or 0,), jnp.int32))

    def put(state: Shard, rows: Rows, key: jax.Array, offered: bool = True) -> tuple[Shard, PyTree, jax.Array]:
        """Inserts; gives also the records offered to this shard and the slot of each. Rows are offered to all devices that
        do not divide them, unless each has been given its own."""
        if axis is not None and memory != "sharded" and offered:
            packed, unpack = exchange_lib.pack(rows)
            rows = unpack(lax.all_gather(packed, axis, tiled=True))
        # Devices that choose apart have keys apart; those that hold the same rows make the same choice.
        key = random.fold_in(key, device() if memory == "independent" else part())
        if repeats == "distinct":
            rows = repeats_lib.distinct(state, rows, axis if memory == "sharded" else None)
        slot, meta = rule.choose(state.meta, key, part(), rows.label, rows.valid)
        slot = shard_lib.keep_last(slot, rule.slots)
        record = rows.record
        if store:
            rows = dataclasses.replace(rows, record={})
        state = shard_lib.write(state, rows, slot, meta)
        if state.slot_of is not None:
            slot_of = repeats_lib.remember(state.slot_of, rows.id, slot, rule.slots)
            state = dataclasses.replace(state, slot_of=slot_of)
        return state, record, slot

    def insert(state: Shard, rows: Rows, key: jax.Array) -> Shard:
        assert store is None, "a memory of the host tier is moved by turn and receive"
        return put(state, rows, key)[0]

    def keep(state: Shard, rows: Rows, key: jax.Array) -> Shard:
        assert store is None, "a memory of the host tier is moved by turn and receive"
        return put(state, rows, key, offered=False)[0]

    def plan_draw(state: Shard, key: jax.Array, holders: str | None, count: int) -> draw_lib.Plan:
        """A plan over the shards along the axis `holders`, or over this device's rows alone."""

        def over(x: jax.Array) -> jax.Array:
            return x[None] if holders is None else lax.all_gather(x, holders)

        if sampling == "class_balanced" and rule.class_sizes is not None:
            return draw_lib.make_balanced_plan(key, over(rule.class_sizes(state.meta)), count)
        return draw_lib.make_plan(key, over(rule.size(state.meta, part())), count)

    def pick(state: Shard, key: jax.Array) -> draw_lib.Plan | jax.Array:
        """What is drawn: a plan over all shards, or the ranks int32 `[r]` of this device's own rows."""
        me = device()
        if routes:
            return plan_draw(state, key, axis, representatives)
        if alone:
            return plan_draw(state, key if shards == 1 else random.fold_in(key, me), None, per_device).rank
        # All hold the same rows: every device takes its share of one draw.
        key, offset_key = random.split(key, 2)
        offset = jax.random.randint(offset_key, (), 0, shards)
        plan = plan_draw(state, key, None, representatives)
        return plan.rank[exchange_lib.dealt_to(me, offset, per_device, shards)]

    def supplied(picked: draw_lib.Plan | jax.Array) -> tuple[jax.Array, int]:
        """The first position in `picked` of this shard's rows, and how many there may be."""
        if isinstance(picked, draw_lib.Plan):
            return picked.first[device()], representatives
        return jnp.int32(0), per_device

    def locate(state: Shard, picked: draw_lib.Plan | jax.Array, position: jax.Array) -> jax.Array:
        """Where the rows at these positions of `picked` lie, if they are of this shard; else anything."""
        if isinstance(picked, draw_lib.Plan):
            rank = picked.rank.at[position].get(mode="clip") - picked.base[device()]
        else:
            rank = jnp.where(picked != draw_lib.NONE, picked, 0)[position]
        return rule.locate(state.meta, part(), rank)

    def bring(picked: draw_lib.Plan | jax.Array, read: Callable[[jax.Array], PyTree]) -> Drawn:
        """Carries what is picked to where it is wanted; `read`: see `exchange.run`."""
        if isinstance(picked, draw_lib.Plan):
            (stored, label, ident), source, valid = exchange_lib.run(routes, picked, device(), read)
        else:
            valid = picked != draw_lib.NONE
            rows = read(jnp.arange(per_device, dtype=jnp.int32))
            stored, label, ident = jax.tree.map(lambda x: _zero_unless(valid, x), rows)
            source = jnp.where(valid, device(), -1)
        return Drawn(record=stored, label=label, id=jnp.where(valid, ident, -1), valid=valid, shard=source)

    def draw(state: Shard, key: jax.Array) -> Drawn:
        assert store is None, "a memory of the host tier is moved by turn and receive"
        picked = pick(state, key)
        return bring(picked, lambda position: shard_lib.read(state, locate(state, picked, position)))

    def request(state: Shard, key: jax.Array) -> Pending:
        """A draw whose rows are still in host memory."""
        picked = pick(state, key)
        first, count = supplied(picked)
        send = locate(state, picked, first + jnp.arange(count, dtype=jnp.int32))
        send = jnp.clip(send, 0, rule.slots - 1)
        if isinstance(picked, draw_lib.Plan):
            picked = jax.tree.map(lambda x: x[None], picked)
        return Pending(picked, send, state.label[send], state.id[send])

    def stage(state: Shard, keys: Sequence[jax.Array]) -> Staged:
        return tuple(draw(state, key) if store is None else request(state, key) for key in keys)

    def turn(
        state: Shard, rows: Rows, insert_key: jax.Array, draw_keys: Sequence[jax.Array], step: jax.Array
    ) -> tuple[Shard, Staged, Handover | tuple[()]]:
        state, record, slot = put(state, rows, insert_key)
        staged = stage(state, draw_keys)
        if store is None:
            return state, staged, ()
        wide = jnp.bool_(False)
        for picked in (pending.picked for pending in staged):
            if isinstance(picked, draw_lib.Plan):
                wide |= jnp.max(picked.first[0, 1:] - picked.first[0, :-1]) > store.narrow
        sent = jnp.stack([p.slot for p in staged]) if staged else jnp.zeros((0, 0), jnp.int32)
        what = Handover(step[None], slot, exchange_lib.pack(record)[0], sent[None], wide[None])
        return state, staged, host_lib.hand_over(store, handover, device(), what)

    def receive(staged: Staged, arrived: jax.Array | None) -> tuple[Drawn, ...]:
        def one(pending: Pending, packed: jax.Array) -> Drawn:
            picked = pending.picked
            if isinstance(picked, draw_lib.Plan):
                picked = jax.tree.map(lambda x: x[0], picked)
            first, _ = supplied(picked)
            sent = (packed, pending.label, pending.id)
            drawn = bring(
                picked, lambda position: jax.tree.map(lambda x: x.at[position - first].get(mode="clip"), sent)
            )
            return dataclasses.replace(drawn, record=exchange_lib.unpack(spec, drawn.record))

        if arrived is None:
            return staged
        drawn = tuple(one(x, rows) for x, rows in zip(staged, jnp.split(arrived, len(staged)), strict=True))
        # XLA must not fuse the way here into what follows, or that is rounded otherwise than for rows that lay ready. The
        # CPU's compiler drops a barrier, but not a branch: always taken, which it cannot know.
        if not on_cpu:
            return lax.optimization_barrier(drawn)
        here = jnp.all(drawn[0].shard >= -1)
        return lax.cond(here, lambda x: x, lambda x: jax.tree.map(jnp.zeros_like, x), drawn)

    def no_rows() -> Drawn | Pending:
        def whole(count: int, value: int) -> jax.Array:
            return jnp.full((count,), value, jnp.int32)

        if store is None:
            record = jax.tree.map(lambda s: jnp.zeros((per_device, *s.shape), s.dtype), spec)
            no = jnp.zeros((per_device,), bool)
            return Drawn(record, whole(per_device, 0), whole(per_device, -1), no, whole(per_device, -1))
        if not routes:
            zeros = whole(per_device, 0)
            return Pending(whole(per_device, draw_lib.NONE), zeros, zeros, zeros)
        plan = draw_lib.Plan(
            whole(representatives, draw_lib.NONE), whole(shards + 1, 0), whole(shards, 0), jnp.int32(0)
        )
        zeros = whole(representatives, 0)
        return Pending(jax.tree.map(lambda x: x[None], plan), zeros, zeros, zeros)

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
        stage=over_mesh(stage, keyed=True),
        stats=make_stats(shards, num_classes),
        no_rows=jax.jit(over_mesh(no_rows, keyed=False)),
        local=Local(insert=insert, keep=keep, draw=draw, turn=turn, receive=receive),
        capacity=capacity,
        representatives=representatives,
        repeats=repeats,
        num_bytes=state_bytes + (store.num_bytes if store else 0),
        traffic={
            "rows_needed": per_device,
            "rows_moved": moved,
            "row_bytes": row_bytes,
            "bytes_moved": moved * row_bytes,
        },
        host=store,
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
