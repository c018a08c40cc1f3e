"""`make_buffer`: checks what it is given and binds the buffer's functions to their sizes."""

import dataclasses
import functools
import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import buffer as device_tier
from jaxcl.buffer import files, remove
from jaxcl.buffer.bits import spec_of
from jaxcl.buffer.buffer import (
    MEMORIES,
    SAMPLINGS,
    Local,
    Sizes,
    Staged,
)
from jaxcl.buffer.exchange import EXCHANGES
from jaxcl.buffer.held import Memory
from jaxcl.buffer.host import feed
from jaxcl.buffer.host.calls import Calls
from jaxcl.buffer.host.feed import HANDOVERS
from jaxcl.buffer.host.rows import check_fits
from jaxcl.buffer.host.store import Store
from jaxcl.buffer.policy import make_policy
from jaxcl.buffer.policy.base import INT32_MAX
from jaxcl.buffer.repeats import REPEATS
from jaxcl.buffer.rows import check_rows
from jaxcl.buffer.shard import Drawn, Rows, Shard
from jaxcl.buffer.stats import can_draw, drawable_here, held_here, size, stats
from jaxcl.buffer.update import update_weights
from jaxcl.buffer.windows import make_window
from jaxcl.check import Rule, check, one_of, refused
from jaxcl.mesh import DATA, WHOLE
from jaxcl.types import PyTree

TIERS = ("device", "host")
LABEL_AND_ID = 8  # bytes of a row beside its record
WEIGHT = 5  # and of its weight, with its part of the sums


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Pure functions over a state pytree, bound to their sizes. Make one with `make_buffer`.

    Attributes:
      init: `() -> state`, an empty buffer, already split over the mesh.
      insert: `(state, rows, key) -> state`. `rows` leaves are `[b, ...]` over all devices, split by rows. In place when
        the state is donated.
      draw: `(state, key) -> Drawn` of `representatives` rows, split by rows over the devices, as `sampling` says; invalid
        where the memory holds fewer. Draws with different keys are independent: call it again for a second set.
      update_weights: `(state, rows, weights) -> state`: other weights float32 `[n]` for stored rows, a `Drawn` or, with
        repeats=distinct, ids int32 `[n]`, split by rows as `draw` gives them. In place when the state is donated, at a cost
        that does not grow with the capacity.
      stage: `(state, keys) -> Staged`, a draw for each key, as a training step leaves it for the next one.
      insert_and_draw: `(state, rows, key) -> (state, Drawn)`, both in one program, compiled, in place: `state` is donated.
      ask, collect: the two halves of `insert_and_draw`, `(state, rows, key) -> (state, asked)` and `(asked) -> Drawn`: in the
        host tier rows are stored and gathered in `collect`, while what was dispatched before it runs.
      size: `(state) -> int32 scalar`, rows stored over all devices, copies included.
      can_draw: `(state) -> bool scalar`, whether every row of a draw would be valid.
      expected: `(state) -> float32 [K]`, rows of each class that a draw from this state is expected to hold, of a buffer that
        counts classes.
      stats: `(state) -> dict` of plain numbers, see `stats.stats`.
      select: `(state, predicate) -> Rows`, the stored rows for which `predicate(record, label, id)` holds, on the host.
      remove: `(state, ids) -> state` without the rows of these ids, see `remove`; donated.
      save, load: `(state, folder, overwrite=False)` writes the memory into files and `(folder) -> state` reads it, see `files`.
      no_rows: `() -> asked` without a valid row, the first value of double-buffered representatives.
      local: the same for use inside `shard_map`; of the host tier `turn` and `receive` in place of insert and draw.
      capacity, representatives, repeats: as given to `make_buffer`.
      num_bytes: bytes of the whole state over all devices, every copy and the rows in host memory included.
      traffic: rows and bytes that a device puts into collectives for one draw, padding included, and what r rows weigh.
      host: the rows in host memory; None in the device tier.
    """

    init: Callable[[], Shard]
    insert: Callable[[Shard, Rows, jax.Array], Shard]
    draw: Callable[[Shard, jax.Array], Drawn]
    update_weights: Callable[[Shard, Any, jax.Array], Shard]
    insert_and_draw: Callable[[Shard, Rows, jax.Array], tuple[Shard, Drawn]]
    ask: Callable[[Shard, Rows, jax.Array], tuple[Shard, Any]]
    collect: Callable[[Any], Drawn]
    stage: Callable[[Shard, Sequence[jax.Array]], Staged]
    size: Callable[[Shard], jax.Array]
    can_draw: Callable[[Shard], jax.Array]
    expected: Callable[[Shard], jax.Array]
    stats: Callable[[Shard], dict[str, Any]]
    select: Callable[[Shard, remove.Predicate], Rows]
    remove: Callable[[Shard, Any], Shard]
    save: Callable[..., None]
    load: Callable[[str | os.PathLike[str]], Shard]
    no_rows: Callable[[], Any]
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
    axis: str | Sequence[str] = DATA,
    memory: str = "sharded",
    exchange: str = "mix",
    sampling: str = "uniform",
    repeats: str = "all",
    num_ids: int | None = None,
    window: int | None = None,
    time: str | None = None,
    tier: str = "device",
    path: str | None = None,
    handover: str = "outputs",
    queue: int = 4,
    count_classes: bool = False,
) -> Buffer:
    """A rehearsal buffer.

    Args:
      record: one record as a pytree of arrays or `jax.ShapeDtypeStruct`, without the leading axis of rows.
      capacity: rows of the memory, at least one a device; what it counts is said by `memory`.
      representatives: rows of one draw over all devices, a multiple of the number of devices, no more than there are.
      policy: which row makes room for a new one, one of `POLICIES` or `module.path:name`.
      num_classes: static bound on the labels, for policies and draws by class.
      accept: probability with which `class_random` stores a row of a full class (the paper's c/b).
      mesh: devices to share the buffer; None keeps it on one device without collectives.
      axis: of the mesh, along which the buffer is shared, or several, which together number its devices; along other axes every
        device holds the same.
      memory: "sharded": the devices' shards together hold `capacity` rows, each device choosing among the rows it is given.
        "replicated": every device holds the same `capacity` rows. "independent": every device holds `capacity` rows of its
        own choice among the rows of all devices, so the union is up to N times as large and rows may be held twice (DyTox's
        "distributed memory").
      exchange: of a sharded memory, one of `EXCHANGES` or `module.path:name`. "mix": every device receives a uniform sample
        of the union. "balance": the same sample of the union, but drawn rows stay where they lie as far as possible.
        "local": every device draws from its own shard alone and nothing travels, which is another law: rows of small shards
        are replayed more often.
      sampling: "uniform": every stored row is equally likely. "class_balanced": every stored class has the same number of
        rows in a draw as far as it holds that many, and within a class every row is equally likely; needs a policy that
        keeps classes apart. "weighted": each next row is drawn in proportion to its weight, among those not drawn yet.
        "uniform_with_replacement" and "weighted_with_replacement": every row is drawn alone, so that one may come twice.
        Of the device tier, if weighted; exchange "local" and independent memories draw alone, so that importance weights are
        for the mean over one device's rows.
      repeats: "all": a row that comes again may be stored again. "distinct": a row whose id is stored is not stored again
        and not counted by the policy, so that the memory holds at most one copy of an id (an "independent" memory: one on
        each device); int32 a device and id. "first_epoch" is the training step's business and means "all" here.
      num_ids: of "distinct", a static bound on the ids: they lie in [0, num_ids).
      window: of the policy `fifo` and the device tier, a draw gives so many rows for one, which follow it in its stream,
        see `windows`; the record's leaves are `[r, window, ...]` then.
      time: of windows, the record's integer scalar that counts the steps of the stream, by its name with dots.
      tier: where records lie: "device", or "host", in host memory, see `host/`; with the same keys both store and draw the
        same rows. A buffer of the host tier owns its rows and serves one state, the one that its last call returned; its
        functions are called outside `jit`, and donate the state.
      path: of the host tier, a folder for memory-mapped files, so that the memory may be larger than RAM.
      handover: of the host tier, how rows leave the step: as its "outputs" or by "callback".
      queue: of the host tier, how many steps' rows may wait to be stored.
      count_classes: whether the state counts its rows of each class, so that `expected` tells how many rows of each
        class a draw is expected to hold; needs `num_classes`.

    Raises:
      UserError: a size, name or record that is not allowed, or rows that cannot fit into memory.
    """
    record = spec_of(record)
    check("buffer.memory", memory, one_of(MEMORIES))
    check("buffer.sampling", sampling, one_of(SAMPLINGS))
    check("buffer.repeats", repeats, one_of(REPEATS))
    check("buffer.tier", tier, one_of(TIERS))
    check("buffer.handover", handover, one_of(HANDOVERS))
    along = _along(mesh, axis)
    shards = 1 if mesh is None else mesh_lib.axis_size(mesh, along)
    check("buffer.capacity", capacity, Rule(_is_size, f"an integer from 1 to {INT32_MAX - 1}"))
    multiple = Rule(
        lambda x: _is_size(x) and x % shards == 0, f"an integer, a positive multiple of the number of devices, {shards}"
    )
    check("buffer.representatives", representatives, multiple)
    parts = shards if memory == "sharded" else 1  # among how many the policy divides `capacity`
    rule = make_policy(policy, capacity=capacity, shards=parts, num_classes=num_classes, accept=accept)
    held = capacity * shards if memory == "independent" else capacity
    check("buffer.capacity", held, Rule(_is_size, f"at most {INT32_MAX - 1} rows over all devices"))
    if representatives > held and not sampling.endswith("with_replacement"):
        raise refused("buffer.representatives", representatives, f"at most {held}, the rows that the memory holds")
    if sampling == "class_balanced" and rule.class_sizes is None:
        raise refused("buffer.sampling", sampling, f"a policy that keeps classes apart, which {policy} does not")
    if repeats == "distinct":
        bound = Rule(_is_size, "a positive integer, which repeats=distinct needs")
        check("buffer.num_ids", num_ids, bound)
    if tier == "host" and sampling.startswith("weighted"):
        raise refused("buffer.sampling", sampling, "another one in the host tier, or tier=device")
    if count_classes:
        check("buffer.num_classes", num_classes, Rule(_is_size, "a positive integer, which count_classes needs"))
    if window is not None:
        check("buffer.window", window, Rule(_is_size, "a positive integer"))
        if policy != "fifo" or tier == "host":
            raise refused("buffer.window", window, "policy=fifo and tier=device with it")
    routes = EXCHANGES.make(exchange, per_device=representatives // shards, shards=shards, axis=along)
    alone = shards == 1 or memory == "independent" or not routes
    sizes = Sizes(
        record=record,
        capacity=capacity,
        representatives=representatives,
        shards=shards,
        axis=None if mesh is None else along,
        memory=memory,
        sampling=sampling,
        policy=rule,
        routes=() if alone or memory == "replicated" else routes,
        alone=alone,
        num_classes=num_classes,
        num_ids=num_ids if repeats == "distinct" else None,
        window=None if window is None else make_window(record, window, time),
        counts_classes=count_classes,
    )
    devices = jax.devices()[:1] if mesh is None else mesh.local_devices
    local = dataclasses.replace(
        device_tier.bind(sizes),
        update_weights=functools.partial(update_weights, sizes),
        drop_classes=functools.partial(remove.drop_classes, sizes),
    )
    beside = LABEL_AND_ID + WEIGHT * sizes.weighted
    store, on_device = None, _bytes(sizes.stored) + beside
    if tier == "host":
        if mesh is None:
            raise refused("buffer.tier", tier, "a mesh with it, which may be one of one device")
        if handover == "callback" and mesh.size > shards:
            raise refused(
                "buffer.handover", handover, f"outputs: {mesh.size} devices hold {shards} shards, and all would call"
            )
        store, on_device = feed.make_store(sizes, mesh, path, queue), beside
        local = feed.bind(sizes, store, handover, on_cpu=devices[0].platform == "cpu")
    check_fits("buffer.capacity", rule.slots * on_device, devices)
    return _over_mesh(sizes, mesh, local, store, policy, repeats)


def _along(mesh: Mesh | None, axis: str | Sequence[str]) -> mesh_lib.Axis:
    """The axis of the mesh along which the buffer is shared."""
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    if mesh is not None and not (axes and len(set(axes)) == len(axes) and set(axes) <= set(mesh.axis_names)):
        raise refused("buffer.axis", axis, f"one or several of the mesh's axes, {', '.join(map(str, mesh.axis_names))}")
    return axes[0] if len(axes) == 1 else axes


def _is_size(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and x is not True and 1 <= int(x) < INT32_MAX


def _over_mesh(sizes: Sizes, mesh: Mesh | None, local: Local, store: Store | None, policy: str, repeats: str) -> Buffer:
    """The functions on global arrays: rows and state split over the mesh, keys known to all."""

    rows_spec = WHOLE if sizes.axis is None else PartitionSpec(sizes.axis)

    def split(function: Callable, *in_specs: PyTree, out: PyTree = rows_spec) -> Callable:
        return function if mesh is None else mesh_lib.over_mesh(mesh, function, in_specs, out)

    def told(here: Callable) -> Callable:
        """What each device tells of itself, `[1]`, known to all: `[N]`."""

        def gathered(state: Shard) -> jax.Array:
            mine = here(sizes, state)
            return mine if sizes.axis is None else lax.all_gather(mine, sizes.axis, tiled=True)

        return jax.jit(split(gathered, rows_spec, out=WHOLE))

    held = told(held_here)
    init, row = split(local.init), _bytes(sizes.stored) + LABEL_AND_ID
    row *= 1 if sizes.window is None else sizes.window.length
    moved = sizes.routes[0].rows_moved if sizes.routes else 0
    drawable = told(drawable_here)
    memory = Memory(sizes, policy, jax.eval_shape(init), mesh, store)
    erase = jax.jit(split(functools.partial(remove.erase, sizes), rows_spec, WHOLE), donate_argnums=0)
    copies = 1 if mesh is None else mesh.size // sizes.shards  # of every shard
    if store is not None and mesh is not None:
        calls: Any = Calls(sizes, mesh, store)
    else:
        calls = _calls(sizes, split(local.insert, rows_spec, rows_spec, WHOLE), split(local.draw, rows_spec, WHOLE))
    return Buffer(
        init=jax.jit(init),
        insert=calls.insert,
        draw=calls.draw,
        update_weights=split(functools.partial(update_weights, sizes), rows_spec, rows_spec, rows_spec),
        insert_and_draw=calls.insert_and_draw,
        ask=calls.ask,
        collect=calls.collect,
        stage=split(local.stage, rows_spec, WHOLE),
        size=lambda state: size(sizes, held(state)),
        can_draw=lambda state: can_draw(sizes, drawable(state)),
        expected=jax.jit(split(local.expected, rows_spec, out=WHOLE)),
        stats=functools.partial(stats, sizes),
        select=functools.partial(remove.select, memory),
        remove=functools.partial(remove.remove, memory, erase),
        save=functools.partial(files.save, memory),
        load=functools.partial(files.load, memory),
        no_rows=jax.jit(split(local.no_rows)),
        local=local,
        capacity=sizes.capacity,
        representatives=sizes.representatives,
        repeats=repeats,
        num_bytes=_bytes(memory.empty) * copies + (store.num_bytes if store else 0),
        traffic={"rows_needed": sizes.per_device, "rows_moved": moved, "row_bytes": row, "bytes_moved": moved * row},
        host=store,
    )


class _Calls(NamedTuple):
    """The functions of the device tier over all devices."""

    insert: Callable[[Shard, Rows, jax.Array], Shard]
    draw: Callable[[Shard, jax.Array], Drawn]
    insert_and_draw: Callable[[Shard, Rows, jax.Array], tuple[Shard, Drawn]]
    ask: Callable[[Shard, Rows, jax.Array], tuple[Shard, Drawn]]
    collect: Callable[[Drawn], Drawn]


def _calls(sizes: Sizes, insert: Callable, draw: Callable) -> _Calls:
    def both(state: Shard, rows: Rows, key: jax.Array) -> tuple[Shard, Drawn]:
        insert_key, draw_key = jax.random.split(key)
        state = insert(state, rows, insert_key)
        return state, draw(state, draw_key)

    def checked(function: Any) -> Callable:
        """The rows are checked as they are given, before JAX narrows their types."""

        def call(state: Shard, rows: Rows, key: jax.Array) -> Any:
            check_rows(
                sizes.record,
                rows,
                labelled=sizes.policy.classes is not None,
                weighted=sizes.weighted,
                shards=sizes.shards,
            )
            return function(state, rows, key)

        return call

    insert_and_draw = checked(jax.jit(both, donate_argnums=0))
    return _Calls(checked(jax.jit(insert)), jax.jit(draw), insert_and_draw, insert_and_draw, lambda asked: asked)


def _bytes(tree: PyTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
