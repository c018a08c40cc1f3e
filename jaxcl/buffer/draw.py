"""Which rows are drawn: a sample of the union without replacement, planned alike on every device.

All devices share the key and the N shard sizes, so each computes the same plan and no coordination is needed. Row numbers
("ranks") of the union run through shard 0's rows first, then shard 1's, and so on. The cost depends on R, the rows drawn,
never on the capacity.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.buffer import threefry as random

NONE = np.iinfo(np.int32).max  # the rank of "no row": sorts behind every real one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """One global draw of R rows, equal on all devices.

    Attributes:
      rank: int32 `[R]`, the drawn ranks of the union in ascending order, `NONE` behind them.
      first: int32 `[N + 1]`; shard s supplies the plan's positions first[s]..first[s+1]-1.
      base: int32 `[N]`, the rank of each shard's first row.
      offset: int32 scalar in [0, N), uniform: where dealing the rows to devices begins.
    """

    rank: jax.Array
    first: jax.Array
    base: jax.Array
    offset: jax.Array


def make_plan(key: jax.Array, sizes: jax.Array, count: int) -> Plan:
    """Plans a simple random sample of `count` rows from shards that hold `sizes` rows (int32 `[N]`)."""
    words = random.words(key, 4 * count + 1)
    rank = sample_ranks(key, words[:, 1:], jnp.sum(sizes, dtype=jnp.int32), count)
    return _plan(rank, sizes, words[:, :1])


def make_balanced_plan(key: jax.Array, class_sizes: jax.Array, count: int) -> Plan:
    """Plans a draw of `count` rows in which every class held by the union has the same number of rows, or all it has.

    Which classes get one row more is random where the numbers do not divide; within a class every subset of rows is equally
    likely. Needs a policy that orders the ranks of a shard class by class.

    Args:
      key: shared by all devices.
      class_sizes: int32 `[N, K]`, rows of each class in each shard.
      count: R.
    """
    classes = class_sizes.shape[1]
    words = random.words(key, 1 + classes + count)
    share = fair_shares(words[0, 1 : 1 + classes], jnp.sum(class_sizes, axis=0, dtype=jnp.int32), count)
    until = jnp.cumsum(share)
    position = jnp.arange(count, dtype=jnp.int32)
    label = jnp.searchsorted(until, position, side="right", method="scan_unrolled").astype(jnp.int32)
    real = position < until[-1]
    label = jnp.where(real, label, 0)
    number = _distinct_within(words[:, 1 + classes :], label, real, jnp.sum(class_sizes, axis=0)[label])
    # From "row `number` of its class" to the shard that holds it, then to its rank in the union.
    until_shard = jnp.cumsum(class_sizes, axis=0)[:, label]
    holder = jnp.sum(until_shard <= number[None, :], axis=0, dtype=jnp.int32)
    holder = jnp.minimum(holder, class_sizes.shape[0] - 1)
    within = number - (until_shard[holder, position] - class_sizes[holder, label])
    before_class = jnp.cumsum(class_sizes, axis=1)[holder, label] - class_sizes[holder, label]
    sizes = jnp.sum(class_sizes, axis=1, dtype=jnp.int32)
    rank = (jnp.cumsum(sizes) - sizes)[holder] + before_class + within
    return _plan(jnp.sort(jnp.where(real, rank, NONE)), sizes, words[:, :1])


def _plan(rank: jax.Array, sizes: jax.Array, words: jax.Array) -> Plan:
    until = jnp.cumsum(sizes, dtype=jnp.int32)
    bounds = jnp.concatenate([jnp.zeros((1,), jnp.int32), until])
    first = jnp.searchsorted(rank, bounds, method="scan_unrolled").astype(jnp.int32)
    return Plan(rank=rank, first=first, base=until - sizes, offset=random.below(words, jnp.int32(sizes.shape[0]))[0])


def own_plan(rank: jax.Array) -> Plan:
    """The plan of a draw from one device's rows: `rank` int32 `[r]` of them, `NONE` where there is none; N is 1."""
    zero = jnp.int32(0)
    return Plan(rank, first=jnp.array([0, len(rank)], jnp.int32), base=zero[None], offset=zero)


def no_plan(count: int, shards: int) -> Plan:
    """The plan of a draw without a row."""
    zero = jnp.int32(0)
    return Plan(jnp.full((count,), NONE), jnp.zeros((shards + 1,), jnp.int32), jnp.zeros((shards,), jnp.int32), zero)


def sample_ranks(key: jax.Array, words: jax.Array, total: jax.Array, count: int) -> jax.Array:
    """`count` distinct integers, uniform over the subsets of [0, total), ascending; int32 `[count]`.

    With fewer than `count` integers all are returned, followed by `NONE`.

    From 4 * count integers upwards, 2 * count are drawn with replacement and the first `count` distinct ones kept; in the
    rare case of fewer distinct ones all are drawn again, which keeps the law: every step treats all integers alike. Below,
    the 4 * count integers are permuted.

    Args:
      key: for drawing again.
      words: uint32 `[2, 4 * count]`, random.
      total: int32 scalar.
      count: how many.
    """
    return lax.cond(
        total < 4 * count,
        lambda: _by_permutation(words, total, count),
        lambda: _by_rejection(key, words, total, count),
    )


def _by_permutation(words: jax.Array, total: jax.Array, count: int) -> jax.Array:
    integer = jnp.arange(4 * count, dtype=jnp.int32)
    # 64 random bits each: ties, which would favour small integers, have probability below 1e-12 at count = 1024.
    outside, _, _, integer = lax.sort((integer >= total, words[0], words[1], integer), num_keys=3)
    return jnp.sort(jnp.where(outside, NONE, integer)[:count])


def _by_rejection(key: jax.Array, words: jax.Array, total: jax.Array, count: int) -> jax.Array:
    n = 2 * count

    def attempt(words: jax.Array) -> jax.Array:
        value, position = lax.sort((random.below(words, total), jnp.arange(n, dtype=jnp.int32)), num_keys=2)
        fresh = jnp.concatenate([jnp.ones((1,), bool), value[1:] != value[:-1]])
        # In the order of drawing: the position at which the count-th distinct value appeared.
        last = jnp.sort(jnp.where(fresh, position, n))[count - 1]
        return jnp.sort(jnp.where(fresh & (position <= last), value, NONE))[:count]

    def incomplete(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        # Under vmap the branch runs for every seed, also where it is not taken and could never be complete.
        return (carry[1][-1] == NONE) & (total >= 2 * n)

    def again(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        key = random.fold_in(carry[0], jnp.int32(1))
        return key, attempt(random.words(key, n))

    return lax.while_loop(incomplete, again, (key, attempt(words[:, :n])))[1]


def fair_shares(words: jax.Array, sizes: jax.Array, count: jax.Array | int) -> jax.Array:
    """Deals `count` rows to classes that have `sizes` rows (int32 `[K]`), as evenly as their sizes allow; int32 `[K]`.

    Water-filling: every class gets min(size, level), and of the classes that have more, random ones get one row extra, by
    `words`, uint32 `[K]`.
    """
    ascending = jnp.sort(sizes)
    k = sizes.shape[0]
    before = jnp.cumsum(ascending) - ascending
    # With the i smallest classes exhausted the others can be filled to level[i]; the first class it does not exhaust decides.
    level = (count - before) // (k - jnp.arange(k))
    stops = level < ascending
    level = jnp.where(jnp.any(stops), level[jnp.argmax(stops)], NONE)
    share = jnp.minimum(sizes, level)
    spare = jnp.where(level == NONE, 0, count - jnp.sum(share))
    # A stable order of the classes that can take one more, random among themselves.
    order = jnp.argsort(jnp.where(sizes > level, words >> 1, jnp.uint32(2**31)))
    return share.at[order].add((jnp.arange(k) < spare).astype(share.dtype))


def _distinct_within(words: jax.Array, label: jax.Array, real: jax.Array, total: jax.Array) -> jax.Array:
    """Distinct integers for the positions of each label, uniform over the subsets of [0, total); int32 `[R]`.

    Floyd's algorithm (Bentley and Floyd 1987) runs over all labels at once: the m positions of a label, `total` its rows,
    take t uniform in [0, j] for j = total - m .. total - 1, or j itself if t is taken. It never draws again, so the last row
    of a small class costs what the first costs.
    """
    count = label.shape[0]
    position = jnp.arange(count, dtype=jnp.int32)
    same = (label[:, None] == label[None, :]) & real[None, :]
    ahead = jnp.sum(same & (position[None, :] < position[:, None]), axis=1)
    j = jnp.where(real, total - jnp.sum(same, axis=1) + ahead, 0).astype(jnp.int32)
    t = random.below(words, j + 1)

    def take(i: jax.Array, taken: jax.Array) -> jax.Array:
        again = jnp.any(same[i] & (position < i) & (taken == t[i]))
        return taken.at[i].set(jnp.where(again, j[i], t[i]))

    return lax.fori_loop(0, count, take, jnp.full_like(label, -1))
