"""The functions of the buffer: init, insert and draw. `make_buffer` (`make.py`) binds them to their sizes.

They work on one device's part of their arguments, inside `shard_map` where there is a mesh. An insert lets the policy choose a
slot for each row and writes it there. A draw plans which rows of the union are drawn, alike on all devices (`draw.py`), finds
where they lie, and carries them to where they are wanted (`exchange/`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import bits, class_rows, repeats, shard, weights, windows
from jaxcl.buffer import draw as draw_lib
from jaxcl.buffer import rows as rows_lib
from jaxcl.buffer import threefry as random
from jaxcl.buffer.draw import Plan
from jaxcl.buffer.exchange import base as exchange
from jaxcl.buffer.exchange.base import Read, Route
from jaxcl.buffer.policy import Policy
from jaxcl.buffer.policy.base import INT32_MAX, share
from jaxcl.buffer.shard import Drawn, Rows, Shard
from jaxcl.buffer.windows import Window
from jaxcl.check import refused
from jaxcl.errors import UserError
from jaxcl.types import PyTree

MEMORIES = ("sharded", "replicated", "independent")
DRAWS = ("uniform", "class_balanced")  # that training knows
SAMPLINGS = (*DRAWS, "uniform_with_replacement", "weighted", "weighted_with_replacement")
Staged = tuple[Any, ...]  # of Drawn, in the host tier of Pending


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static of a buffer: what `make_buffer` is given, and what follows from it.

    Attributes:
      record: one record as a pytree of `jax.ShapeDtypeStruct`.
      shards: N, the number of devices.
      axis: of the mesh, one name or several; None without one.
      policy: which slot a row takes, bound to this capacity.
      routes: of the exchange; () where no row travels.
      alone: whether every device draws from the rows it holds, without knowing of the others.
      num_ids: None unless copies are refused.
      window: what a draw gives in place of one row; None: one row.
      counts_classes: whether shards count their rows of each class.
    """

    record: PyTree
    capacity: int
    representatives: int
    shards: int
    axis: mesh_lib.Axis | None
    memory: str
    sampling: str
    policy: Policy
    routes: tuple[Route, ...]
    alone: bool
    num_classes: int | None
    num_ids: int | None
    window: Window | None = None
    counts_classes: bool = False

    @property
    def weighted(self) -> bool:
        """Whether rows have weights."""
        return self.sampling.startswith("weighted")

    @property
    def replaces(self) -> bool:
        """Whether a drawn row is put back, so that it may be drawn again."""
        return self.sampling.endswith("with_replacement")

    @property
    def per_device(self) -> int:
        """r, rows of one draw on each device."""
        return self.representatives // self.shards

    @property
    def stored(self) -> PyTree:
        """One record as it is stored, a pytree of `jax.ShapeDtypeStruct`."""
        return jax.tree.map(bits.stored_as, self.record)

    def device(self) -> jax.Array:
        """This device's number, int32.

        Raises:
          UserError: the function is traced where the axis is missing or has another size than the buffer was made for.
        """
        if self.axis is None:
            return jnp.int32(0)
        try:
            found = lax.axis_size(self.axis)
        except NameError:
            found = 0
        if found != self.shards:
            where = f"where it has {found}" if found else "outside shard_map over it"
            raise UserError(f"buffer: made for {self.shards} devices along the axis {self.axis!r}, used {where}")
        return lax.axis_index(self.axis).astype(jnp.int32)

    def part(self) -> jax.Array:
        """This device's number among those that divide the capacity."""
        return self.device() if self.memory == "sharded" else jnp.int32(0)

    def holder(self) -> jax.Array:
        """The number of this device's shard in a plan."""
        return self.device() if self.routes else jnp.int32(0)


def init(sizes: Sizes) -> Shard:
    """An empty memory."""
    state = shard.empty(sizes.stored, sizes.policy.slots, sizes.policy.init(sizes.part()))
    slot_of = None if sizes.num_ids is None else jnp.zeros((sizes.num_ids,), jnp.int32)
    tree = weights.empty(sizes.policy.slots) if sizes.weighted else None
    none = jnp.zeros((1,), jnp.int32)
    counts = jnp.zeros((1, sizes.num_classes or 0), jnp.int32) if sizes.counts_classes else None
    more: dict[str, Any] = {"came": none, "refused": none, "slot_of": slot_of, "weights": tree, "class_rows": counts}
    return mesh_lib.varying(sizes.axis, dataclasses.replace(state, **more))


# Insert.


def insert(sizes: Sizes, state: Shard, rows: Rows, key: jax.Array) -> Shard:
    """Stores rows `[b, ...]`: of a sharded memory those that this device is given, else those of all devices.

    Raises:
      UserError: the rows do not fit the record.
    """
    state, rows = given(sizes, state, rows)
    return _store(sizes, state, offered(sizes, rows), key)


def keep(sizes: Sizes, state: Shard, rows: Rows, key: jax.Array) -> Shard:
    """Stores rows that this device is given, whatever the memory."""
    return _store(sizes, *given(sizes, state, rows), key)


def _store(sizes: Sizes, state: Shard, rows: Rows, key: jax.Array) -> Shard:
    slot, state = choose(sizes, state, rows, key)
    return write(sizes, state, rows, slot)


def given(sizes: Sizes, state: Shard, rows: Rows) -> tuple[Shard, Rows]:
    """The rows that this device is given, checked, completed and in bits, and the state that has counted them."""
    n = rows_lib.check_rows(sizes.record, rows, labelled=sizes.policy.classes is not None, weighted=sizes.weighted)
    rows = rows_lib.complete(rows, n, lambda j: sizes.device() + sizes.shards * (state.came[0] + j))
    rows = dataclasses.replace(rows, record=jax.tree.map(bits.to_bits, rows.record))
    return mesh_lib.varying(sizes.axis, (dataclasses.replace(state, came=state.came + n), rows))


def offered(sizes: Sizes, rows: Rows) -> Rows:
    """The rows that this device chooses among: its own where devices divide the memory, else those of all."""
    if sizes.axis is None or sizes.memory == "sharded":
        return rows
    packed, unpacked = exchange.pack(rows)
    return unpacked(lax.all_gather(packed, sizes.axis, tiled=True))


def choose(sizes: Sizes, state: Shard, rows: Rows, key: jax.Array) -> tuple[jax.Array, Shard]:
    """The slot of each row, int32 `[b]`, unique, out of range where it is not stored; and the state that has counted them."""
    # Devices that choose apart have keys apart; those that hold the same rows make the same choice.
    key = random.fold_in(key, sizes.device() if sizes.memory == "independent" else sizes.part())
    storable = rows_lib.storable(rows, sizes.policy.classes, sizes.num_ids)
    refused = state.refused + jnp.minimum(jnp.sum(rows.valid & ~storable, dtype=jnp.int32), INT32_MAX - state.refused)
    rows = dataclasses.replace(rows, valid=rows.valid & storable, label=jnp.where(storable, rows.label, 0))
    if sizes.num_ids is not None:
        rows = repeats.distinct(state, rows, sizes.axis if sizes.memory == "sharded" else None)
    slot, meta = sizes.policy.choose(state.meta, key, sizes.part(), rows.label, rows.valid)
    return shard.keep_last(slot, sizes.policy.slots), dataclasses.replace(state, meta=meta, refused=refused)


def write(sizes: Sizes, state: Shard, rows: Rows, slot: jax.Array) -> Shard:
    """Stores the rows at these slots."""
    if state.class_rows is not None:
        counts, slot = class_rows.counted(state, rows, slot)
        state = dataclasses.replace(state, class_rows=counts)
    state = shard.write(state, rows, slot)
    if state.weights is not None:
        state = dataclasses.replace(state, weights=weights.put(state.weights, slot, rows.weight))
    if state.slot_of is None:
        return state
    slot_of = repeats.remember(state.slot_of, rows.id, slot, sizes.policy.slots)
    return dataclasses.replace(state, slot_of=slot_of)


# Draw.


def draw(sizes: Sizes, state: Shard, key: jax.Array) -> Drawn:
    """This device's r of R drawn rows; invalid where the memory holds fewer. No gradient passes."""
    return stage(sizes, state, [key])[0]


def stage(sizes: Sizes, state: Shard, keys: Sequence[jax.Array], *, joined: bool = False) -> tuple[Drawn, ...]:
    """A draw for each key, as a training step leaves it for the next one; their rows travel together.

    `joined`: the sizes of the shards travel with what else the program sums over the devices, see `mesh.sum_counts`. That saves
    a message, and the draws wait for what is summed.
    """
    plans = [pick(sizes, state, key, joined=joined) for key in keys]
    return bring(sizes, plans, [functools.partial(read, sizes, state, plan) for plan in plans])


def read(sizes: Sizes, state: Shard, plan: Plan, position: jax.Array) -> tuple[PyTree, jax.Array, jax.Array, dict]:
    """The (record, label, id, further fields of `Drawn`) of the rows at these positions of the plan, if of this shard."""
    slot, more = locate(sizes, state, plan, position), {}
    if plan.supply is not None:
        nth = position - plan.first[sizes.holder()]
        supplied = jax.tree.map(lambda x: x.at[nth].get(mode="clip"), plan.supply)
        more = {"slot": slot, "weight": supplied.weight, "importance": supplied.importance}
    if sizes.window is None:
        return *shard.read(state, slot), more
    parts = sizes.shards if sizes.memory == "sharded" else 1
    room = share(sizes.part(), sizes.capacity, parts)
    record, more["length"] = windows.read(sizes.window, state, slot, room)
    _, label, ident = shard.read(dataclasses.replace(state, record={}), slot)
    return record, label, ident, more


def pick(sizes: Sizes, state: Shard, key: jax.Array, *, joined: bool = False) -> Plan:
    """What is drawn: a plan over all shards where there are routes, else one of this device's own rows; see `stage`."""
    if sizes.routes:
        return _plan(sizes, state, key, sizes.axis, sizes.representatives, joined=joined)
    if sizes.alone:
        if sizes.shards > 1:
            # N first, which is no device's number: an insert with the same key chooses by other random numbers.
            key = random.fold_in(random.fold_in(key, jnp.int32(sizes.shards)), sizes.device())
        plan = _plan(sizes, state, key, None, sizes.per_device)
        return draw_lib.own_plan(plan.rank, plan.supply)
    # All hold the same rows: every device takes its share of one draw.
    key, offset_key = random.split(key, 2)
    offset = jax.random.randint(offset_key, (), 0, sizes.shards)
    plan = _plan(sizes, state, key, None, sizes.representatives)
    mine = exchange.dealt_to(sizes.device(), offset, sizes.per_device, sizes.shards)
    return draw_lib.own_plan(*jax.tree.map(lambda x: x[mine], (plan.rank, plan.supply)))


def _plan(
    sizes: Sizes, state: Shard, key: jax.Array, axis: mesh_lib.Axis | None, count: int, *, joined: bool = False
) -> Plan:
    """A draw of `count` rows from the shards along `axis`, or from this device's alone."""
    rule = sizes.policy

    def over(x: jax.Array) -> jax.Array:
        return x[None] if axis is None else lax.all_gather(x, axis)

    def known(rows: jax.Array) -> jax.Array:
        return over(rows) if axis is None or not joined else mesh_lib.gather_counts(axis, rows, sizes.capacity)

    if state.weights is not None:
        me, replace = sizes.holder(), sizes.replaces
        return weights.make_weighted_plan(key, state.weights, count, me=me, over=over, replace=replace)
    if sizes.sampling == "class_balanced" and rule.class_sizes is not None:
        return draw_lib.make_balanced_plan(key, known(rule.class_sizes(state.meta)), count)
    held = known(rule.size(state.meta, sizes.part()))
    if sizes.replaces:
        return draw_lib.make_plan_with_replacement(key, held, count)
    return draw_lib.make_plan(key, held, count, sizes.capacity)


def locate(sizes: Sizes, state: Shard, plan: Plan, position: jax.Array) -> jax.Array:
    """The slots of the rows at these positions of the plan, if they are of this shard; else anything."""
    if plan.supply is not None:
        return plan.supply.slot.at[position - plan.first[sizes.holder()]].get(mode="clip")
    rank = plan.rank.at[position].get(mode="clip") - plan.base[sizes.holder()]
    return sizes.policy.locate(state.meta, sizes.part(), rank)


def bring(
    sizes: Sizes,
    plans: Sequence[Plan],
    reads: Sequence[Read],
    unpacked: Callable[[Any], PyTree] = lambda record: record,
) -> tuple[Drawn, ...]:
    """Carries what is drawn to where it is wanted.

    Each of `reads` gives (record, label, id) and possibly further fields, see `exchange.base.run`; `unpacked` makes of its
    record the one that is stored.
    """
    carried = exchange.run(sizes.routes, plans, sizes.device(), reads) if plans else ()
    return tuple(_drawn(sizes, unpacked, *each) for each in carried)


def _drawn(sizes: Sizes, unpacked: Callable, rows: PyTree, source: jax.Array, valid: jax.Array) -> Drawn:
    record, label, ident, *more = rows
    record = jax.tree.map(bits.from_bits, sizes.record, unpacked(record))
    valid &= ident >= 0  # the place of a removed row is empty
    label, source = jnp.where(valid, label, 0), jnp.where(valid, source, -1)
    return Drawn(record, label, jnp.where(valid, ident, -1), valid, source, **(more[0] if more else {}))


def expected(sizes: Sizes, state: Shard) -> jax.Array:
    """Rows of each class that a draw from this state is expected to hold over all devices: float32 `[K]`, alike on all.

    Exact for the samplings "uniform" and "class_balanced", every memory and exchange, unless rows were removed.

    Raises:
      UserError: the buffer does not count classes.
    """
    if state.class_rows is None:
        raise refused("buffer.count_classes", False, "True, so that expected rows of each class are known")
    held, drawn = state.class_rows[0], sizes.per_device if sizes.alone else sizes.representatives
    if sizes.routes:
        assert sizes.axis is not None
        held = mesh_lib.sum_counts(sizes.axis, held, sizes.capacity)
    rows = class_rows.drawn_of(held, drawn, sizes.sampling)
    return lax.psum(rows, sizes.axis) if sizes.alone and sizes.axis is not None else rows


def no_rows(sizes: Sizes) -> Drawn:
    """A draw without a valid row."""
    r = sizes.per_device
    length = () if sizes.window is None else (sizes.window.length,)
    zeros = jax.tree.map(lambda s: jnp.zeros((r, *length, *s.shape), s.dtype), sizes.stored)
    record = jax.tree.map(bits.from_bits, sizes.record, zeros)
    none, zero, more = jnp.full((r,), -1, jnp.int32), jnp.zeros((r,), jnp.int32), {}
    if sizes.weighted:
        more = {"slot": zero, "weight": jnp.zeros((r,), jnp.float32), "importance": jnp.zeros((r,), jnp.float32)}
    if sizes.window is not None:
        more["length"] = zero
    return mesh_lib.varying(sizes.axis, Drawn(record, zero, none, jnp.zeros((r,), bool), none, **more))


@dataclasses.dataclass(frozen=True)
class Local:
    """A tier's functions, bound to their sizes, for use inside an existing `shard_map`, on this device's part of everything.

    Those of the device tier are described above. A step of it calls `insert`, then `draw`; one of the host tier calls `turn`
    and, in the next step, `receive`, see `host/feed.py`. `stage` and `no_rows` give `Pending` in the host tier.
    """

    init: Callable[[], Shard]
    insert: Callable[[Shard, Rows, jax.Array], Shard]
    keep: Callable[[Shard, Rows, jax.Array], Shard]
    draw: Callable[[Shard, jax.Array], Drawn]
    stage: Callable[..., Staged]
    no_rows: Callable[[], Any]
    expected: Callable[[Shard], jax.Array]
    update_weights: Any = None
    drop_classes: Any = None
    turn: Any = None
    receive: Any = None


def bind(sizes: Sizes) -> Local:
    """The functions of the device tier."""
    functions: tuple[Callable, ...] = (init, insert, keep, draw, stage, no_rows, expected)
    bound: dict[str, Any] = {f.__name__: functools.partial(f, sizes) for f in functions}
    return Local(**bound)
