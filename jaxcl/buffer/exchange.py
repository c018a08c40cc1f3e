"""Who sends which drawn row to whom: the only collectives that move samples.

The plan (`draw.py`) lists the drawn rows of the union in ascending rank, so the rows of one shard stand together. All
devices hold the same plan, so sender and receiver agree on every place without a word exchanged.

`mix` deals position p of the plan to device (p + offset) mod N. Every shard's rows are thus dealt round-robin: each device
receives exactly r = R / N rows, a uniform sample of the union, and a pair of devices exchanges at most ceil(s / N) rows, s
being what the source supplies. `balance` leaves rows where they lie and moves only what a shard supplies beyond r.
Which device computes a representative's gradient does not change the averaged gradient, so both obey the same law.

A route carries rows by `all_to_all` of static size. The compact route fits almost every draw; the others take a full one,
which fits all. Devices agree on the branch because they agree on the plan.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.buffer.draw import NONE, Plan
from jaxcl.types import PyTree

EXCHANGES = ("mix", "balance", "local")


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


def run(
    routes: tuple[Route, ...], plan: Plan, me: jax.Array, read: Callable[[jax.Array], PyTree]
) -> tuple[PyTree, jax.Array, jax.Array]:
    """Carries the rows of `plan` by the first of `routes` that fits; the last one must fit always.

    Args:
      routes: one or two.
      plan: the draw, alike on all devices.
      me: int32 scalar, this device's number.
      read: `(position int32 [n]) -> pytree of arrays [n, ...]`, rows of this shard by their position in the plan; for one
        that is not of this shard any row will do.

    Returns:
      (rows `[r, ...]`, zero where invalid; source shard int32 `[r]`, -1 where invalid; validity bool `[r]`).
    """

    def by(route: Route) -> tuple[PyTree, jax.Array, jax.Array]:
        position = route.send(plan, me)
        packed, unpack = pack(read(position))
        position = route.receive(plan, me)
        valid = plan.rank[position] != NONE
        rows = unpack(jnp.where(valid[:, None], route.carry(plan, me, packed), 0))
        return rows, jnp.where(valid, source_of(plan, position), -1), valid

    if len(routes) == 1:
        return by(routes[0])
    compact, full = routes
    return lax.cond(compact.fits(plan), lambda: by(compact), lambda: by(full))


def source_of(plan: Plan, position: jax.Array) -> jax.Array:
    """The shard that supplies each position of the plan (int32, same shape); the last one for those without a row."""
    source = jnp.searchsorted(plan.first, position, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    return jnp.clip(source, 0, plan.base.shape[0] - 1)


def dealt_to(me: jax.Array, offset: jax.Array, per_device: int, shards: int) -> jax.Array:
    """The positions (int32 `[r]`) that go to device `me` when position p goes to (p + offset) mod N."""
    t = jnp.arange(per_device, dtype=jnp.int32)
    return (t * shards + me - offset) % (shards * per_device)


def pack(tree: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """A pytree of arrays `[n, ...]` as one uint8 array `[n, bytes]`, and the way back: one collective for all leaves."""

    def to_bytes(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        return lax.bitcast_convert_type(leaf, jnp.uint8).reshape(leaf.shape[0], -1)

    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)
    packed = jnp.concatenate([to_bytes(leaf) for leaf in jax.tree.leaves(tree)], axis=1)
    return packed, lambda packed: unpack(row, packed)


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


def six_sigma(mean: float, pairs: int) -> int:
    """Rows to provide for where about `mean` rows, with variance at most `mean`, are dealt round-robin to `pairs` places."""
    return max(1, math.ceil((mean + 6.0 * math.sqrt(mean)) / pairs))


@dataclasses.dataclass(frozen=True)
class Hops:
    """The two hops of `mix`: first among `across` devices, `near` rows a pair, then among N / across, `far` rows a pair.

    With device number d = a + across * b, the first hop brings a row to the right a, the second to the right b. One hop is
    the case across = N, in which the second is left out.
    """

    shards: int
    across: int
    near: int
    far: int

    @property
    def along(self) -> int:
        return self.shards // self.across

    @property
    def rows_moved(self) -> int:
        return self.across * self.near + (self.along * self.far if self.along > 1 else 0)


@functools.cache
def compact_hops(per_device: int, shards: int) -> Hops:
    """The cheapest static sizes of `mix` for shards of equal size, by the six-sigma rule.

    A shard supplies a hypergeometric number of rows of mean r, a group of `across` neighbouring shards one of mean
    across * r. A pair of one hop cannot carry less than one row, so with N far above r one hop moves N rows for r needed;
    two hops move about 2 sqrt(N). A second collective is worth it when it at least halves what is moved.
    """

    def sizes(across: int) -> Hops:
        near = min(six_sigma(per_device, across), shards * per_device // across)
        far = min(six_sigma(across * per_device, shards), per_device)
        return Hops(shards, across, near, far)

    one = dataclasses.replace(sizes(shards), near=min(six_sigma(per_device, shards), per_device))
    two = min((sizes(a) for a in range(2, shards) if shards % a == 0), key=lambda h: h.rows_moved, default=one)
    return two if 2 * two.rows_moved <= one.rows_moved else one


def mix_route(hops: Hops, per_device: int, axis: str) -> Route:
    """Position p goes to device (p + offset) mod N; see the module's text.

    A device sends its positions first[me]..first[me+1]-1. Those bound for the same a are `across` apart, so the k-th of them
    is the nearest one congruent to it plus k * across. At the second hop, device (a, b) holds those of its group's positions
    that are bound for a; the ones bound for device d are N apart. All places follow in closed form.
    """
    shards, across, near, far = hops.shards, hops.across, hops.near, hops.far
    rows = [[a + across * b for a in range(across)] for b in range(hops.along)]
    columns = [list(column) for column in zip(*rows, strict=True)]

    def nearest(begin: jax.Array, remainder: jax.Array, modulus: int, plan: Plan) -> jax.Array:
        """The first position from `begin` on with (position + offset) mod modulus = remainder."""
        return begin + (remainder - plan.offset - begin) % modulus

    def fits(plan: Plan) -> jax.Array:
        supplied = jnp.max(plan.first[1:] - plan.first[:-1])
        ok = -(-supplied // across) <= near
        if hops.along > 1:
            group = plan.first[::across]
            ok &= -(-jnp.max(group[1:] - group[:-1]) // shards) <= far
        return ok

    def send(plan: Plan, me: jax.Array) -> jax.Array:
        start = nearest(plan.first[me], jnp.arange(across, dtype=jnp.int32), across, plan)
        position = start[:, None] + across * jnp.arange(near, dtype=jnp.int32)[None, :]
        return jnp.where(position < plan.first[me + 1], position, plan.first[me]).reshape(-1)

    def receive(plan: Plan, me: jax.Array) -> jax.Array:
        return dealt_to(me, plan.offset, per_device, shards)

    def carry(plan: Plan, me: jax.Array, packed: jax.Array) -> jax.Array:
        groups = None if hops.along == 1 else rows
        packed = lax.all_to_all(packed, axis, 0, 0, axis_index_groups=groups, tiled=True)

        def after_first(position: jax.Array) -> jax.Array:
            source = source_of(plan, position)
            return source % across * near + (position - plan.first[source]) // across

        position = receive(plan, me)
        if hops.along == 1:
            return packed[after_first(position)]
        mine, b = me % across, me // across
        targets = mine + across * jnp.arange(hops.along, dtype=jnp.int32)
        onward = nearest(plan.first[b * across], targets, shards, plan)
        onward = onward[:, None] + shards * jnp.arange(far, dtype=jnp.int32)[None, :]
        packed = packed.at[after_first(onward.reshape(-1))].get(mode="clip")
        packed = lax.all_to_all(packed, axis, 0, 0, axis_index_groups=columns, tiled=True)
        group = source_of(plan, position) // across
        return packed[group * far + (position - plan.first[group * across]) // shards]

    return Route(fits, send, carry, receive, hops.rows_moved)


class _Moves(NamedTuple):
    """The rows that `balance` gives away, numbered u = 0, 1, ... in order of position; int32 or bool `[R]` each.

    Attributes:
      real: is there a u-th such row.
      position: its position in the plan.
      source, target: from and to which device.
      place: which of the target's r places it takes.
      nth: its number among the rows of its (source, target) pair.
    """

    real: jax.Array
    position: jax.Array
    source: jax.Array
    target: jax.Array
    place: jax.Array
    nth: jax.Array


def _moves(plan: Plan, per_device: int) -> _Moves:
    shards, count = plan.base.shape[0], plan.rank.shape[0]
    u = jnp.arange(count, dtype=jnp.int32)
    supplied = plan.first[1:] - plan.first[:-1]
    extra = jnp.maximum(supplied - per_device, 0)
    begin = jnp.cumsum(extra, dtype=jnp.int32) - extra
    source = jnp.searchsorted(begin, u, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    real = u < jnp.sum(extra)
    # The u-th free place, level by level over the devices.
    kept = jnp.minimum(supplied, per_device)
    level = jnp.arange(per_device, dtype=jnp.int32)
    free = (level[:, None] < (per_device - kept)[None, :]).reshape(-1)
    number = jnp.where(free, jnp.cumsum(free, dtype=jnp.int32) - 1, count)
    where = jnp.zeros((count,), jnp.int32).at[number].set(u, mode="drop")
    target = where % shards
    # Sorted by (source, target), a row's number within its pair is its distance from where the pair begins.
    code, row = lax.sort((jnp.where(real, source * shards + target, shards * shards), u), num_keys=2)
    nth = u - jnp.searchsorted(code, code, method="scan_unrolled").astype(jnp.int32)
    return _Moves(
        real=real,
        position=plan.first[source] + per_device + u - begin[source],
        source=source,
        target=target,
        place=kept[target] + where // shards,
        nth=jnp.zeros((count,), jnp.int32).at[row].set(nth),
    )


def balance_pair(per_device: int) -> int:
    """Rows a pair may exchange in the compact route of `balance`: met by all but about 1 in 1,000 draws of equal shards.

    From simulation over N = 2..1024 and r = 1..512 (experiments/bench/exchange.py repeats it): the largest pair of a draw is
    governed by the deviation of what one shard supplies, sqrt(r), not by N.
    """
    return min(per_device, math.ceil(2.25 * math.sqrt(per_device)))


def balance_route(pair: int, per_device: int, shards: int, axis: str) -> Route:
    """Every device keeps up to r of the rows its shard supplies; what is beyond goes to those that have fewer.

    The rows given away, in order of position, take the free places in the order "first free place of every device, then the
    second, ...": neighbours go to different devices, so that a pair exchanges few.
    """
    count = shards * per_device

    def fits(plan: Plan) -> jax.Array:
        moves = _moves(plan, per_device)
        return jnp.max(jnp.where(moves.real, moves.nth, 0)) < pair

    def send(plan: Plan, me: jax.Array) -> jax.Array:
        moves = _moves(plan, per_device)
        kept = plan.first[me] + jnp.arange(per_device, dtype=jnp.int32)
        mine = moves.real & (moves.source == me) & (moves.nth < pair)
        slot = jnp.where(mine, moves.target * pair + moves.nth, shards * pair)
        away = jnp.broadcast_to(plan.first[me], (shards * pair,)).at[slot].set(moves.position, mode="drop")
        return jnp.concatenate([kept, away])

    def arrival(plan: Plan, me: jax.Array, moves: _Moves) -> jax.Array:
        """Which of the rows given away fills each of my r places; -1 for none."""
        place = jnp.where(moves.real & (moves.target == me), moves.place, per_device)
        u = jnp.arange(count, dtype=jnp.int32)
        return jnp.full((per_device,), -1, jnp.int32).at[place].set(u, mode="drop")

    def receive(plan: Plan, me: jax.Array) -> jax.Array:
        moves = _moves(plan, per_device)
        by = arrival(plan, me, moves)
        position = plan.first[me] + jnp.arange(per_device, dtype=jnp.int32)
        # A place that nothing fills, possible only where the draw is not full, names the last position: no row.
        stayed = jnp.where(position < plan.first[me + 1], position, count - 1)
        return jnp.where(by >= 0, moves.position[by], stayed)

    def carry(plan: Plan, me: jax.Array, packed: jax.Array) -> jax.Array:
        moves = _moves(plan, per_device)
        moved = lax.all_to_all(packed[per_device:], axis, 0, 0, tiled=True)
        by = arrival(plan, me, moves)
        came = moved.at[moves.source[by] * pair + moves.nth[by]].get(mode="clip")
        return jnp.where((by >= 0)[:, None], came, packed[:per_device])

    return Route(fits, send, carry, receive, shards * pair)


def make_routes(exchange: str, per_device: int, shards: int, axis: str) -> tuple[Route, ...]:
    """The routes of `mix` or `balance`: the compact one, if it is smaller, and the one that always fits."""
    if exchange == "balance":
        compact = balance_route(balance_pair(per_device), per_device, shards, axis)
        full = balance_route(per_device, per_device, shards, axis)
    else:
        compact = mix_route(compact_hops(per_device, shards), per_device, axis)
        full = mix_route(Hops(shards, shards, per_device, per_device), per_device, axis)
    return (full,) if compact.rows_moved == full.rows_moved else (compact, full)
