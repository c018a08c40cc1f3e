"""Who sends which drawn row to whom: routes, the only collectives that move samples, and how rows travel on them.

The plan (`draw.py`) lists the drawn rows of the union in ascending rank, so the rows of one shard stand together. All
devices hold the same plan, so sender and receiver agree on every place without a word exchanged.

A route carries rows by `all_to_all` of static size. The compact route fits almost every draw; the others take a full one,
which fits all. Devices agree on the branch because they agree on the plan.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.buffer.draw import NONE, Plan
from jaxcl.types import PyTree


class Route(NamedTuple):
    """A way for drawn rows to travel, of static size.

    Attributes:
      fits: `(plan) -> bool scalar`: whether it can carry the draw.
      send: `(plan, me) -> int32 [n]`: positions of the plan whose rows device `me` hands over, in the order `carry` wants
        them; places to spare hold any position of the shard or an invalid one.
      carry: `(plan, me, packed [n, bytes]) -> [r, bytes]`: this device's rows, in the order of `receive`.
      receive: `(plan, me) -> int32 [r]`: positions of the plan of the rows device `me` ends up with; one whose rank is
        `NONE` is no row.
      rows_moved: rows a device puts into its collectives, padding included.
    """

    fits: Callable[[Plan], jax.Array]
    send: Callable[[Plan, jax.Array], jax.Array]
    carry: Callable[[Plan, jax.Array, jax.Array], jax.Array]
    receive: Callable[[Plan, jax.Array], jax.Array]
    rows_moved: int


Carried = tuple[PyTree, jax.Array, jax.Array]  # what `run` returns
Read = Callable[[jax.Array], PyTree]


def run(routes: tuple[Route, ...], plans: Sequence[Plan], me: jax.Array, reads: Sequence[Read]) -> tuple[Carried, ...]:
    """Carries the rows of some draws, all of them together, by the first of `routes` that fits every one; the last fits always.

    Args:
      routes: two, one, or none if the plans are of this device's own rows.
      plans: one a draw, at least one, alike on all devices if there are routes.
      me: int32 scalar, this device's number.
      reads: of each draw `(position int32 [n]) -> pytree of arrays [n, ...]`, rows of this shard by their position in the
        plan; for one that is not of this shard any row will do.

    Returns:
      Of each draw (rows `[r, ...]`, zero where invalid; source shard int32 `[r]`, -1 where invalid; validity bool `[r]`).
    """
    if not routes:
        return tuple(_own(plan, me, read) for plan, read in zip(plans, reads, strict=True))
    by = functools.partial(_run_by, plans=plans, me=me, reads=reads)
    if len(routes) == 1:
        return by(routes[0])
    compact, full = routes
    fits = functools.reduce(jnp.logical_and, map(compact.fits, plans))
    return lax.cond(fits, lambda: by(compact), lambda: by(full))


def _own(plan: Plan, me: jax.Array, read: Read) -> Carried:
    valid = plan.rank != NONE
    rows = read(jnp.arange(len(plan.rank), dtype=jnp.int32))
    rows = jax.tree.map(lambda x: jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype)), rows)
    return rows, jnp.where(valid, me, -1), valid


def _run_by(route: Route, plans: Sequence[Plan], me: jax.Array, reads: Sequence[Read]) -> tuple[Carried, ...]:
    sent = [pack(read(route.send(plan, me))) for plan, read in zip(plans, reads, strict=True)]
    came = _carried(route, plans, me, [packed for packed, _ in sent])
    return tuple(
        _arrived(route, *each, me) for each in zip(plans, came, (unpacked for _, unpacked in sent), strict=True)
    )


def _carried(route: Route, plans: Sequence[Plan], me: jax.Array, packed: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """What comes of each draw, `[r, bytes]`: several draws make one message."""
    if len(plans) == 1:
        return [route.carry(plans[0], me, packed[0])]
    together = jax.tree.map(lambda *x: jnp.stack(x), *plans)
    return list(jax.vmap(lambda plan, rows: route.carry(plan, me, rows))(together, jnp.stack(packed)))


def _arrived(
    route: Route, plan: Plan, came: jax.Array, unpacked: Callable[[jax.Array], PyTree], me: jax.Array
) -> Carried:
    position = route.receive(plan, me)
    valid = plan.rank[position] != NONE
    rows = unpacked(jnp.where(valid[:, None], came, 0))
    return rows, jnp.where(valid, source_of(plan, position), -1), valid


def smaller(compact: Route, full: Route) -> tuple[Route, ...]:
    """Both routes, or the full one alone if the compact one moves as many rows."""
    return (full,) if compact.rows_moved == full.rows_moved else (compact, full)


def source_of(plan: Plan, position: jax.Array) -> jax.Array:
    """The shard that supplies each position of the plan (int32, same shape); the last one for those without a row."""
    source = jnp.searchsorted(plan.first, position, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    return jnp.clip(source, 0, plan.base.shape[0] - 1)


def dealt_to(me: jax.Array, offset: jax.Array, per_device: int, shards: int) -> jax.Array:
    """The positions (int32 `[r]`) that go to device `me` when position p goes to (p + offset) mod N."""
    t = jnp.arange(per_device, dtype=jnp.int32)
    return (t * shards + me - offset) % (shards * per_device)


def six_sigma(mean: float, pairs: int) -> int:
    """Rows to provide for where about `mean` rows, with variance at most `mean`, are dealt round-robin to `pairs` places."""
    return max(1, math.ceil((mean + 6.0 * math.sqrt(mean)) / pairs))


def pack(tree: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """A pytree of arrays `[n, ...]` as one uint8 array `[n, bytes]`, and the way back: one collective for all leaves."""
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)
    packed = jnp.concatenate([_to_bytes(leaf) for leaf in jax.tree.leaves(tree)], axis=1)
    return packed, functools.partial(unpack, row)


def _to_bytes(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    return lax.bitcast_convert_type(leaf, jnp.uint8).reshape(leaf.shape[0], -1)


def unpack(row: PyTree, packed: jax.Array) -> PyTree:
    """The pytree of arrays `[n, ...]` that `pack` made into `packed`; `row` gives shapes and dtypes of one row."""
    leaves, treedef = jax.tree.flatten(row)
    n, out, at = packed.shape[0], [], 0
    for leaf in leaves:
        shape, dtype = leaf.shape, leaf.dtype
        width = math.prod(shape) * dtype.itemsize
        part = packed[:, at : at + width]
        at += width
        if dtype == jnp.bool_:
            out.append(part.reshape(n, *shape).astype(jnp.bool_))
        elif dtype.itemsize == 1:
            out.append(lax.bitcast_convert_type(part.reshape(n, *shape), dtype))
        else:
            out.append(lax.bitcast_convert_type(part.reshape(n, *shape, dtype.itemsize), dtype))
    return jax.tree.unflatten(treedef, out)
