"""Weights of stored rows, and draws in proportion to them: prioritised replay (Schaul et al. 2016), exact and sharded.

Every shard keeps its weights as the leaves of a tree of sums, `RADIX` children a node. An update writes leaves and adds up
the nodes above them anew, so that no rounding error accumulates.

A draw without replacement runs a race: row i arrives after a time of exponential law with rate w_i, and the R rows that
arrive first are drawn. This is successive sampling: each next row is drawn with probability w / (sum of the weights not drawn
yet). A node arrives with the first row below it. So the race is run from the top down, and on each level only the nodes
that arrive first matter, as in stochastic beam search (Kool, van Hoof & Welling 2019). Given that a node arrives at t, its
children arrive at t + X_i - min_j X_j, with X_i exponential of rate w_i: the first is child i with probability w_i / sum,
and the others, which are not there yet, start again. No step depends on how the weights differ.

Sums and times are float32: probabilities are right to a relative 1e-6. Positive weights outside [2**-64, 2**64] count as the
nearer end, so that no sum overflows and no time is denormal.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.buffer import threefry as random
from jaxcl.buffer.draw import NONE, Plan, Supply

RADIX = 8
LEAST, MOST = 2.0**-64, 2.0**64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of one shard.

    Attributes:
      levels: float32 `[slots]`, the weights, 0 where no row lies; then the sums of each `RADIX` neighbours of the level
        before, until at most `RADIX` are left.
      greatest: float32 `[1]`, the greatest weight stored so far, 0 at first.
      positive: int32 `[1]`, how many weights are above 0.
    """

    levels: tuple[jax.Array, ...]
    greatest: jax.Array
    positive: jax.Array


def empty(slots: int) -> Weights:
    """Of a shard without rows."""
    lengths = [slots]
    while lengths[-1] > RADIX:
        lengths.append(-(-lengths[-1] // RADIX))
    levels = tuple(jnp.zeros((n,), jnp.float32) for n in lengths)
    return Weights(levels, jnp.zeros((1,), jnp.float32), jnp.zeros((1,), jnp.int32))


def usable(weight: jax.Array) -> jax.Array:
    """Whether each weight is one that a row can have: finite and not negative."""
    return (weight >= 0) & (weight < jnp.inf)


def put(tree: Weights, slot: jax.Array, weight: jax.Array | None) -> Weights:
    """Gives the rows at `slot` (int32 `[b]`, unique or out of range = none) these usable weights, float32 `[b]`.

    None: the greatest weight stored so far, 1 at first. In place when the tree is donated, O(b) a level.
    """
    leaves, *sums = tree.levels
    if weight is None:
        weight = jnp.broadcast_to(jnp.where(tree.greatest > 0, tree.greatest, 1.0), slot.shape)
    # By its bits, as denormal numbers count as 0 in arithmetic.
    above = lax.bitcast_convert_type(weight, jnp.int32) > 0
    weight = jnp.where(above, jnp.clip(weight, LEAST, MOST), 0.0)
    inside = slot < len(leaves)
    before = leaves.at[slot].get(mode="clip")
    # No weight is negative, which XLA cannot know: the write depends on the read, or XLA would copy the leaves.
    leaves = leaves.at[jnp.where(before >= 0, slot, len(leaves))].set(weight, mode="drop", unique_indices=True)
    levels = [leaves]
    for level in sums:
        slot = slot // RADIX
        levels.append(level.at[slot].set(_sum(_children(levels[-1], slot)), mode="drop"))
    gained = jnp.sum(inside & above, dtype=jnp.int32) - jnp.sum(inside & (before > 0), dtype=jnp.int32)
    greatest = jnp.maximum(tree.greatest, jnp.max(jnp.where(inside, weight, 0.0), initial=0.0))
    return Weights(tuple(levels), greatest, tree.positive + gained)


def _children(level: jax.Array, node: jax.Array) -> jax.Array:
    """The entries of `level` below nodes int32 `[n]` of the next one; `[n, RADIX]`, 0 beyond its end."""
    child = node[:, None] * RADIX + jnp.arange(RADIX, dtype=jnp.int32)
    return level.at[child].get(mode="fill", fill_value=0)


def _sum(children: Any) -> Any:
    """In one order, so that two rows with the same parent write the same bits."""
    return functools.reduce(operator.add, (children[..., i] for i in range(RADIX)))


def build(leaves: np.ndarray, greatest: Any) -> Weights:
    """The global arrays of N shards, in NumPy: their weights float32 `[N, slots]`, and the greatest of each or of all."""
    levels: list[Any] = [leaves]
    while levels[-1].shape[1] > RADIX:
        padded = np.pad(levels[-1], ((0, 0), (0, -levels[-1].shape[1] % RADIX)))
        levels.append(_sum(padded.reshape(len(leaves), -1, RADIX)))
    most: Any = np.full((len(leaves),), greatest, np.float32)
    positive: Any = np.sum(leaves > 0, axis=1, dtype=np.int32)
    return Weights(tuple(level.reshape(-1) for level in levels), most, positive)


# Draws.


def arrivals(words: jax.Array, weight: jax.Array) -> jax.Array:
    """Times of exponential law with rate `weight`, float32, of words uint32 of the same shape; inf where the weight is 0."""
    share = jnp.minimum((words.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return jnp.where(weight > 0, -jnp.log1p(-share) / jnp.where(weight > 0, weight, 1.0), jnp.inf)


def first_to_arrive(key: jax.Array, tree: Weights, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` rows of this shard that arrive first, in their order, and when: (slot int32, time float32) `[count]`.

    Times are inf where there are fewer rows of positive weight. O(count) a level, but for the levels above the first that
    has more than `count * RADIX` nodes, which are left out.
    """
    depth = next(i for i, level in enumerate(tree.levels) if len(level) <= RADIX * count)
    top = tree.levels[depth]
    kept = [min(count, len(level)) for level in tree.levels[: depth + 1]]
    need = len(top) + RADIX * sum(kept[1:])
    words = random.words(key, -(-need // 2)).reshape(-1)
    time, node = _least(arrivals(words[: len(top)], top), jnp.arange(len(top), dtype=jnp.int32), kept[depth])
    at = len(top)
    for i in reversed(range(depth)):
        n = len(node) * RADIX
        lap = arrivals(words[at : at + n].reshape(-1, RADIX), _children(tree.levels[i], node))
        ahead = jnp.min(lap, axis=1, keepdims=True)
        later = jnp.where(lap < jnp.inf, time[:, None] + (lap - ahead), jnp.inf)
        child = node[:, None] * RADIX + jnp.arange(RADIX, dtype=jnp.int32)
        time, node = _least(later.reshape(-1), child.reshape(-1), kept[i])
        at += n
    missing = count - len(node)
    return jnp.pad(node, (0, missing)), jnp.pad(time, (0, missing), constant_values=jnp.inf)


def _least(time: jax.Array, node: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    least, at = lax.top_k(-time, min(count, len(time)))
    return -least, node[at]


def independent(key: jax.Array, tree: Weights, count: int) -> jax.Array:
    """`count` slots of this shard, int32, each drawn alone in proportion to the weights; any slots if all weights are 0."""
    top = tree.levels[-1]
    words = random.words(key, -(-count * (len(top) + RADIX * (len(tree.levels) - 1)) // 2)).reshape(-1)
    at = count * len(top)
    node = jnp.argmin(arrivals(words[:at].reshape(count, -1), top[None, :]), axis=1).astype(jnp.int32)
    for level in reversed(tree.levels[:-1]):
        lap = arrivals(words[at : at + count * RADIX].reshape(count, RADIX), _children(level, node))
        node = node * RADIX + jnp.argmin(lap, axis=1).astype(jnp.int32)
        at += count * RADIX
    return node


Over = Callable[[jax.Array], jax.Array]


def make_weighted_plan(key: jax.Array, tree: Weights, count: int, *, me: jax.Array, over: Over, replace: bool) -> Plan:
    """Plans a draw of `count` rows of the union in proportion to their weights, without replacement or with.

    Importance weights: the mean of importance * f over the rows drawn is an unbiased estimate of the mean of f over all M rows
    of positive weight. Without replacement, given the time t of the first row that is not drawn, a row was drawn with
    probability q = 1 - exp(-w t), and 1 / q of it counts (priority sampling: Duffield, Lund & Thorup 2007). With replacement
    1 / w counts (Hansen & Hurwitz 1943).

    Args:
      key: shared by all devices.
      tree: of this shard.
      count: R.
      me: this shard's number.
      over: an array of this shard -> those of all shards `[N, ...]`. One collective, of R + 2 numbers or of 2.
      replace: whether rows are put back.
    """
    tree = lax.stop_gradient(tree)
    make = _with_replacement if replace else _without_replacement
    return make(key, tree, count, me, over)


def _keys(key: jax.Array, shards: int, me: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A key for all devices and one for this. N is no device's number: no insert with the same key has these."""
    key, own = random.split(random.fold_in(key, jnp.int32(shards)), 2)
    return key, random.fold_in(own, me)


def _without_replacement(key, tree, count, me, over):
    shards = jax.eval_shape(over, tree.positive).shape[0]
    key, own = _keys(key, shards, me)
    slot, time = first_to_arrive(own, tree, count + 1)
    sent = jnp.concatenate([lax.bitcast_convert_type(time, jnp.int32), tree.positive])
    came = over(sent)
    times, rows = lax.bitcast_convert_type(came[:, :-1], jnp.float32), jnp.sum(came[:, -1], dtype=jnp.int32)
    # Each shard's times ascend and equal ones go by place, so that what is drawn of a shard is the beginning of its list.
    least, at = lax.top_k(-times.reshape(-1), count + 1)
    drawn, until = -least[:-1] < jnp.inf, -least[-1]
    weight = tree.levels[0].at[slot[:-1]].get(mode="clip")
    q = -jnp.expm1(-weight * until)
    importance = jnp.sum(drawn, dtype=jnp.int32) / (jnp.maximum(rows, 1) * jnp.where(q > 0, q, 1.0))
    return _plan(key, at[:-1] // (count + 1), drawn, shards, Supply(slot[:-1], weight, importance))


def _with_replacement(key, tree, count, me, over):
    sent = jnp.concatenate([lax.bitcast_convert_type(jnp.sum(tree.levels[-1])[None], jnp.int32), tree.positive])
    came = over(sent)
    totals, rows = lax.bitcast_convert_type(came[:, 0], jnp.float32), jnp.sum(came[:, 1], dtype=jnp.int32)
    shards = len(totals)
    key, own = _keys(key, shards, me)
    key, to = random.split(key, 2)
    words = random.words(to, -(-count * shards // 2)).reshape(-1)[: count * shards]
    shard = jnp.argmin(arrivals(words.reshape(count, shards), totals[None, :]), axis=1).astype(jnp.int32)
    slot = independent(own, tree, count)
    weight = tree.levels[0].at[slot].get(mode="clip")
    importance = jnp.sum(totals) / (jnp.maximum(rows, 1) * jnp.where(weight > 0, weight, 1.0))
    return _plan(key, shard, jnp.broadcast_to(rows > 0, (count,)), shards, Supply(slot, weight, importance))


def _plan(key: jax.Array, shard: jax.Array, drawn: jax.Array, shards: int, supply: Supply) -> Plan:
    """The plan of a draw of so many rows from each shard as it appears in `shard`, int32 `[R]`, among those `drawn`."""
    count = len(shard)
    supplied = jnp.zeros((shards,), jnp.int32).at[jnp.where(drawn, shard, shards)].add(1, mode="drop")
    first = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(supplied, dtype=jnp.int32)])
    number = jnp.arange(count, dtype=jnp.int32)
    return Plan(
        rank=jnp.where(number < first[-1], number, NONE),
        first=first,
        base=jnp.zeros((shards,), jnp.int32),
        offset=random.below(random.words(key, 1), jnp.int32(shards))[0],
        supply=supply,
    )
