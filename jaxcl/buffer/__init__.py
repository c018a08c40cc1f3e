"""The rehearsal buffer: a memory of past rows, sharded over devices, from which all draw without bias.

    buffer = make_buffer(record, capacity=2000, representatives=56, policy="reservoir", mesh=mesh)
    state = buffer.init()
    state = buffer.insert(state, rows, key)      # jit it, donate the state
    drawn = buffer.draw(state, key)              # after the insert: the other order copies the whole buffer

Idea: Bouvier et al., Efficient Data-Parallel Continual Learning with Asynchronous Distributed Rehearsal Buffers, CCGrid 2024.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import draw as draw_lib
from jaxcl.buffer import exchange, shard
from jaxcl.buffer.policy import POLICIES, make_policy
from jaxcl.buffer.shard import Drawn, Rows, Shard
from jaxcl.errors import UserError

__all__ = ["POLICIES", "Buffer", "Drawn", "Local", "Rows", "Shard", "make_buffer"]

PyTree = Any


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
      insert: `(state, rows, key) -> state`. `rows` leaves are `[b, ...]` over all devices, split by rows. In place when the
        state is donated.
      draw: `(state, key) -> Drawn` of `representatives` rows, split by rows over the devices: a simple random sample of the
        union, without replacement; invalid where the union holds fewer.
      stats: `(state) -> dict` of plain numbers: rows, rows_per_shard, distinct_ids, and class_histogram where `num_classes`
        is known. Touches every slot's label and id: for reports, not for every step.
      no_rows: `() -> Drawn` without a valid row, the first value of double-buffered representatives.
      local: insert and draw for use inside `shard_map`.
      capacity: rows in the union of all shards.
      representatives: rows of one draw over all devices.
      num_bytes: bytes of the whole state over all devices.
    """

    init: Callable[[], Shard]
    insert: Callable[[Shard, Rows, jax.Array], Shard]
    draw: Callable[[Shard, jax.Array], Drawn]
    stats: Callable[[Shard], dict[str, Any]]
    no_rows: Callable[[], Drawn]
    local: Local
    capacity: int
    representatives: int
    num_bytes: int


def make_buffer(
    record: PyTree,
    *,
    capacity: int,
    representatives: int,
    policy: str = "reservoir",
    num_classes: int | None = None,
    accept: float | None = None,
    mesh: Mesh | None = None,
) -> Buffer:
    """A rehearsal buffer of `capacity` rows in all, whatever the number of devices.

    Args:
      record: one record as a pytree of arrays or `jax.ShapeDtypeStruct`, without the leading axis of rows.
      capacity: rows in the union of all shards, at least one a device.
      representatives: rows of one draw over all devices, a multiple of the number of devices.
      policy: which row makes room for a new one, one of `POLICIES`.
      num_classes: static bound on the labels, for policies by class.
      accept: probability with which `class_random` stores a row of a full class (the paper's c/b).
      mesh: devices to share the buffer, along the axis `jaxcl.mesh.AXIS`; None keeps it on one device, without collectives.

    Raises:
      UserError: a size or name that is not allowed.
    """
    shards = 1 if mesh is None else mesh.shape[mesh_lib.AXIS]
    if representatives < 1 or representatives % shards:
        raise UserError(
            f"buffer.representatives: {representatives} is not a positive multiple of the number of devices, {shards}"
        )
    rule = make_policy(policy, capacity=capacity, shards=shards, num_classes=num_classes, accept=accept)
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), record)

    def this_shard() -> jax.Array:
        return jnp.int32(0) if mesh is None else lax.axis_index(mesh_lib.AXIS).astype(jnp.int32)

    def init() -> Shard:
        return shard.empty(spec, rule.slots, rule.init(this_shard()))

    def insert(state: Shard, rows: Rows, key: jax.Array) -> Shard:
        me = this_shard()
        slot, meta = rule.choose(state.meta, jax.random.fold_in(key, me), me, rows.label, rows.valid)
        return shard.write(state, rows, shard.keep_last(slot, rule.slots), meta)

    def draw(state: Shard, key: jax.Array) -> Drawn:
        me = this_shard()

        def read(rank):
            return shard.read(state, rule.locate(state.meta, me, rank))

        size = rule.size(state.meta, me)
        sizes = size[None] if mesh is None else lax.all_gather(size, mesh_lib.AXIS)
        plan = draw_lib.make_plan(key, sizes, representatives)
        (stored, label, ident), source, valid = exchange.mix(plan, None if mesh is None else mesh_lib.AXIS, read)
        return Drawn(record=stored, label=label, id=jnp.where(valid, ident, -1), valid=valid, shard=source)

    def no_rows() -> Drawn:
        n = representatives // shards
        minus_one = jnp.full((n,), -1, jnp.int32)
        return Drawn(
            record=jax.tree.map(lambda s: jnp.zeros((n, *s.shape), s.dtype), spec),
            label=jnp.zeros((n,), jnp.int32),
            id=minus_one,
            valid=jnp.zeros((n,), bool),
            shard=minus_one,
        )

    def count(state: Shard) -> dict[str, jax.Array]:
        written = state.id >= 0
        ids = jnp.sort(state.id)
        new = jnp.concatenate([ids[:1] >= 0, (ids[1:] >= 0) & (ids[1:] != ids[:-1])])
        counts = {"rows_per_shard": jnp.sum(written.reshape(shards, -1), axis=1), "distinct_ids": jnp.sum(new)}
        if num_classes is not None:
            counts["class_histogram"] = jnp.zeros(num_classes, jnp.int32).at[state.label].add(written)
        return counts

    whole = None if mesh is None else mesh_lib.replicated(mesh)
    jitted_count = jax.jit(count, out_shardings=whole)

    def stats(state: Shard) -> dict[str, Any]:
        counts = {name: np.asarray(value).tolist() for name, value in jitted_count(state).items()}
        return {"rows": sum(counts["rows_per_shard"]), **counts}

    def over_mesh(function: Callable, *, keyed: bool) -> Callable:
        """The function on global arrays: rows and state split over the mesh, the key known to all."""
        if mesh is None:
            return function
        split = PartitionSpec(mesh_lib.AXIS)

        def call(*args: PyTree) -> PyTree:
            specs = (split,) * (len(args) - keyed) + (PartitionSpec(),) * keyed
            return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)(*args)

        return call

    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(over_mesh(init, keyed=False))))
    return Buffer(
        init=jax.jit(over_mesh(init, keyed=False)),
        insert=over_mesh(insert, keyed=True),
        draw=over_mesh(draw, keyed=True),
        stats=stats,
        no_rows=jax.jit(over_mesh(no_rows, keyed=False)),
        local=Local(insert=insert, draw=draw),
        capacity=capacity,
        representatives=representatives,
        num_bytes=state_bytes,
    )
