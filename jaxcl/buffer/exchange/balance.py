"""Drawn rows stay where they lie as far as possible, and only the surplus travels.

The global batch obeys the same exact law as that of `mix`, as which device computes a row's gradient does not change the mean
gradient; a device's own rows are no uniform sample of the union.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.buffer.draw import Plan
from jaxcl.buffer.exchange.base import Route, smaller
from jaxcl.mesh import Axis


def balance(per_device: int, shards: int, axis: Axis) -> tuple[Route, ...]:
    """The compact route, if it is smaller, and the one that always fits."""
    pairs = compact_pair(per_device), per_device
    return smaller(*(balance_route(pair, per_device, shards, axis) for pair in pairs))


def compact_pair(per_device: int) -> int:
    """Rows a pair may exchange in the compact route: the number by which fewest rows move in the mean, misses included.

    From simulation over N = 2..512 and r = 1..56 of equal shards (experiments/bench/exchange.py repeats it): the largest
    pair of a draw is governed by the deviation of what one shard supplies, sqrt(r), not by N. 1 to 15 % of the draws do not
    fit. A pair that fits all but 1 in 1,000 moves up to twice as many rows at every draw.
    """
    return max(1, math.floor(1.3 * math.sqrt(per_device)))


def balance_route(pair: int, per_device: int, shards: int, axis: Axis) -> Route:
    """Every device keeps up to r of the rows its shard supplies; what is beyond goes to those that have fewer.

    The rows given away, in order of position, take the free places in the order "first free place of every device, then the
    second, ...": neighbours go to different devices, so that a pair exchanges few.
    """
    on = functools.partial
    return Route(
        fits=on(_fits, pair, per_device),
        send=on(_send, pair, per_device),
        carry=on(_carry, pair, per_device, axis),
        receive=on(_receive, per_device),
        rows_moved=shards * pair,
    )


class _Moves(NamedTuple):
    """The rows that are given away, numbered u = 0, 1, ... in order of position; int32 or bool `[R]` each.

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


def _fits(pair: int, per_device: int, plan: Plan) -> jax.Array:
    moves = _moves(plan, per_device)
    return jnp.max(jnp.where(moves.real, moves.nth, 0)) < pair


def _send(pair: int, per_device: int, plan: Plan, me: jax.Array) -> jax.Array:
    moves, places = _moves(plan, per_device), plan.base.shape[0] * pair
    kept = plan.first[me] + jnp.arange(per_device, dtype=jnp.int32)
    mine = moves.real & (moves.source == me) & (moves.nth < pair)
    slot = jnp.where(mine, moves.target * pair + moves.nth, places)
    away = jnp.broadcast_to(plan.first[me], (places,)).at[slot].set(moves.position, mode="drop")
    return jnp.concatenate([kept, away])


def _arrival(moves: _Moves, per_device: int, me: jax.Array) -> jax.Array:
    """Which of the rows given away fills each of my r places; -1 for none."""
    place = jnp.where(moves.real & (moves.target == me), moves.place, per_device)
    u = jnp.arange(len(moves.real), dtype=jnp.int32)
    return jnp.full((per_device,), -1, jnp.int32).at[place].set(u, mode="drop")


def _receive(per_device: int, plan: Plan, me: jax.Array) -> jax.Array:
    moves = _moves(plan, per_device)
    by = _arrival(moves, per_device, me)
    position = plan.first[me] + jnp.arange(per_device, dtype=jnp.int32)
    # A place that nothing fills, possible only where the draw is not full, names the last position: no row.
    stayed = jnp.where(position < plan.first[me + 1], position, len(plan.rank) - 1)
    return jnp.where(by >= 0, moves.position[by], stayed)


def _carry(pair: int, per_device: int, axis: Axis, plan: Plan, me: jax.Array, packed: jax.Array) -> jax.Array:
    moves = _moves(plan, per_device)
    moved = lax.all_to_all(packed[per_device:], axis, 0, 0, tiled=True)
    by = _arrival(moves, per_device, me)
    came = moved.at[moves.source[by] * pair + moves.nth[by]].get(mode="clip")
    return jnp.where((by >= 0)[:, None], came, packed[:per_device])
