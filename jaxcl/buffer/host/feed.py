"""What the step of the host tier does on the device, and how the loop calls such a step.

The functions are those of `jaxcl.buffer.buffer` but for the records: an insert hands them over to the `Store`, and a draw asks
it for them. What is asked for in step t has arrived in step t + 1, which carries it to where it is wanted.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import io_callback
from jax.sharding import Mesh

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import buffer, draw
from jaxcl.buffer.buffer import Local, Sizes
from jaxcl.buffer.draw import Plan
from jaxcl.buffer.exchange.base import Read, pack, six_sigma, unpack
from jaxcl.buffer.host.messages import Handover, Pending
from jaxcl.buffer.host.store import Store
from jaxcl.buffer.shard import Drawn, Rows, Shard
from jaxcl.check import refused

HANDOVERS = ("callback", "outputs")


def make_store(sizes: Sizes, mesh: Mesh, path: str | None, queue: int) -> Store:
    """The rows of a buffer in host memory; see `Store`."""
    # A device has to send what its shard supplies: r rows on average, so that this almost always suffices.
    narrow = min(six_sigma(sizes.per_device, 1), sizes.representatives) if sizes.routes else sizes.per_device
    assert sizes.axis is not None
    return Store(sizes.stored, sizes.policy.slots, narrow, mesh, sizes.axis, path, queue)


def bind(sizes: Sizes, store: Store, handover: str, *, on_cpu: bool) -> Local:
    """The functions of the host tier."""
    on = functools.partial
    return Local(
        init=on(buffer.init, dataclasses.replace(sizes, record={})),
        insert=refuse,
        keep=refuse,
        draw=refuse,
        stage=on(stage, sizes),
        turn=on(turn, sizes, store, handover),
        receive=on(receive, sizes, on_cpu),
        no_rows=on(no_rows, sizes),
        expected=on(buffer.expected, sizes),
    )


def refuse(*args: Any) -> Any:
    """In place of insert, keep and draw."""
    raise refused(
        "buffer.tier", "host", "device: inside shard_map a memory of the host tier is moved by turn and receive"
    )


def turn(
    sizes: Sizes,
    store: Store,
    handover: str,
    state: Shard,
    rows: Rows,
    insert_key: jax.Array,
    draw_keys: Sequence[jax.Array],
    step: jax.Array,
) -> tuple[Shard, tuple[Pending, ...], tuple[Handover, ...]]:
    """An insert, then a draw for each key: decides where the rows go and which ones are sent, and hands both over.

    `step` is the number of the step, one more each time. What is still to be handed over is returned, for `Store.passed`.
    """
    state, rows = buffer.given(sizes, state, rows)
    rows = buffer.offered(sizes, rows)
    slot, state = buffer.choose(sizes, state, rows, insert_key)
    state = buffer.write(sizes, state, dataclasses.replace(rows, record={}), slot)
    staged = stage(sizes, state, draw_keys)
    wide = jnp.bool_(False)
    for first in (pending.picked.first[0] for pending in staged if isinstance(pending.picked, Plan)):
        wide |= jnp.max(first[1:] - first[:-1]) > store.narrow
    sent = jnp.stack([pending.slot for pending in staged]) if staged else jnp.zeros((0, 0), jnp.int32)
    what = Handover(step[None], slot, pack(rows.record)[0], sent[None], wide[None])
    if handover == "outputs":
        return state, staged, (what,)
    io_callback(store.hand_over, None, sizes.device(), *what, ordered=False)
    return state, staged, ()


def stage(sizes: Sizes, state: Shard, keys: Sequence[jax.Array]) -> tuple[Pending, ...]:
    return tuple(request(sizes, state, key) for key in keys)


def request(sizes: Sizes, state: Shard, key: jax.Array) -> Pending:
    """A draw whose rows are still in host memory."""
    plan = buffer.pick(sizes, state, key)
    position = plan.first[sizes.holder()] + jnp.arange(len(plan.rank), dtype=jnp.int32)
    slot = jnp.clip(buffer.locate(sizes, state, plan, position), 0, sizes.policy.slots - 1)
    return Pending(_kept(sizes, plan), slot, state.label[slot], state.id[slot])


def receive(sizes: Sizes, on_cpu: bool, staged: tuple[Pending, ...], arrived: jax.Array | None) -> tuple[Drawn, ...]:
    """The draws, of the rows that have arrived for them: uint8 `[draws * n, bytes]`; None without a draw."""
    if arrived is None:
        return ()
    parts = jnp.split(arrived, len(staged))
    plans, reads = zip(*map(functools.partial(_to_read, sizes), staged, parts), strict=True)
    drawn = buffer.bring(sizes, plans, reads, lambda packed: unpack(sizes.stored, packed))
    # XLA must not fuse the way here into what follows, or that is rounded otherwise than for rows that lay ready. The
    # CPU's compiler drops a barrier, but not a branch: always taken, which it cannot know.
    if not on_cpu:
        return lax.optimization_barrier(drawn)
    here = jnp.all(drawn[0].shard >= -1)
    return lax.cond(here, lambda x: x, lambda x: jax.tree.map(jnp.zeros_like, x), drawn)


def _to_read(sizes: Sizes, pending: Pending, packed: jax.Array) -> tuple[Plan, Read]:
    """The plan of a draw, and its rows by their position in it."""
    if isinstance(pending.picked, Plan):
        plan = jax.tree.map(lambda x: x[0], pending.picked)
    else:
        plan = draw.own_plan(pending.picked)
    first, sent = plan.first[sizes.holder()], (packed, pending.label, pending.id)
    return plan, lambda position: jax.tree.map(lambda x: x.at[position - first].get(mode="clip"), sent)


def no_rows(sizes: Sizes) -> Pending:
    """A draw without a valid row."""
    count = sizes.representatives if sizes.routes else sizes.per_device
    zeros = jnp.zeros((count,), jnp.int32)
    none = Pending(_kept(sizes, draw.no_plan(count, sizes.shards)), zeros, zeros, zeros)
    return mesh_lib.varying(sizes.axis, none)


def _kept(sizes: Sizes, plan: Plan) -> Plan | jax.Array:
    """A plan as `Pending` keeps it: with a leading axis of devices, or the ranks alone of this device's own rows."""
    return jax.tree.map(lambda x: x[None], plan) if sizes.routes else plan.rank
