"""Which rows are drawn: a sample of the union, planned alike on every device.

All devices share the key and the N shard sizes, so each computes the same plan and no coordination is needed. Row numbers
("ranks") of the union run through shard 0's rows first, then shard 1's, and so on. The cost depends on R, the rows drawn,
never on the capacity.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.buffer import sort
from jaxcl.buffer import threefry as random

NONE = np.iinfo(np.int32).max  # the rank of "no row": sorts behind every real one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Supply:
    """What one shard supplies to a weighted draw, in the order of its positions in the plan.

    Attributes:
      slot: int32 `[R]`, where the rows lie; anything beyond what the shard supplies.
      weight, importance: float32 `[R]`, of these rows, see `weights.make_weighted_plan`.
    """

    slot: jax.Array
    weight: jax.Array
    importance: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """One global draw of R rows, equal on all devices but for `supply`.

    Attributes:
      rank: int32 `[R]`, the drawn ranks of the union in ascending order, `NONE` behind them; of a weighted draw 0, 1, 2, ...
      first: int32 `[N + 1]`; shard s supplies the plan's positions first[s]..first[s+1]-1.
      base: int32 `[N]`, the rank of each shard's first row.
      offset: int32 scalar in [0, N), uniform: where dealing the rows to devices begins.
      supply: of a weighted draw, this device's; else None.
    """

    rank: jax.Array
    first: jax.Array
    base: jax.Array
    offset: jax.Array
    supply: Supply | None = None


def make_plan(key: jax.Array, sizes: jax.Array, count: int, most: int = 2**31 - 1) -> Plan:
    """Plans a simple random sample of `count` rows from shards that hold `sizes` rows (int32 `[N]`), together `most` at most;
    the lower that is, the faster, with the same result."""
    words = random.words(key, 4 * count + 1)
    rank = sample_ranks(key, words[:, 1:], jnp.sum(sizes, dtype=jnp.int32), count, most)
    return _plan(rank, sizes, words[:, :1])


def make_plan_with_replacement(key: jax.Array, sizes: jax.Array, count: int) -> Plan:
    """Plans `count` rows, each drawn alone and uniformly from shards that hold `sizes` rows (int32 `[N]`)."""
    words, total = random.words(key, 1 + count), jnp.sum(sizes, dtype=jnp.int32)
    rank = jnp.sort(random.below(words[:, 1:], jnp.maximum(total, 1)))
    return _plan(jnp.where(total > 0, rank, NONE), sizes, words[:, :1])


def make_balanced_plan(key: jax.Array, class_sizes: jax.Array, count: int) -> Plan:
    """Plans a draw of `count` rows in which every class held by the union has the same number of rows, or all it has.

    Which classes get one row more is random where the numbers do not divide; within a class every subset of rows is equally
    likely. Needs a policy that orders the ranks of a shard class by class.

    Args:
      key: shared by all devices.
      class_sizes: int32 `[N, K]`, rows of each class in each shard.
      count: R.
    """
    shards, classes = class_sizes.shape
    words = random.words(key, 1 + classes + 3 * count)
    held = jnp.sum(class_sizes, axis=0, dtype=jnp.int32)
    share = fair_shares(words[0, 1 : 1 + classes], held, count)
    number, label, real = _subset_of_each(key, words[:, 1 + classes :], held, share, count)
    # From "row `number` of its class" to its rank. Counted class by class, those of a class shard by shard, the row's number
    # tells its class and holder; a shard counts its ranks class by class as well.
    until = jnp.cumsum(class_sizes.T.reshape(-1), dtype=jnp.int32)
    counted = (jnp.cumsum(held) - held)[label] + number
    part = jnp.minimum(jnp.searchsorted(until, counted, side="right", method="scan_unrolled"), shards * classes - 1)
    size, holder = class_sizes.T.reshape(-1)[part], part % shards
    sizes = jnp.sum(class_sizes, axis=1, dtype=jnp.int32)
    before_class = (jnp.cumsum(class_sizes, axis=1, dtype=jnp.int32) - class_sizes)[holder, label]
    rank = (jnp.cumsum(sizes) - sizes)[holder] + before_class + counted - (until[part] - size)
    return _plan(jnp.sort(jnp.where(real, rank, NONE)), sizes, words[:, :1])


def _plan(rank: jax.Array, sizes: jax.Array, words: jax.Array) -> Plan:
    until = jnp.cumsum(sizes, dtype=jnp.int32)
    bounds = jnp.concatenate([jnp.zeros((1,), jnp.int32), until])
    first = jnp.searchsorted(rank, bounds, method="scan_unrolled").astype(jnp.int32)
    return Plan(rank=rank, first=first, base=until - sizes, offset=random.below(words, jnp.int32(sizes.shape[0]))[0])


def own_plan(rank: jax.Array, supply: Supply | None = None) -> Plan:
    """The plan of a draw from one device's rows: `rank` int32 `[r]` of them, `NONE` where there is none; N is 1."""
    zero = jnp.int32(0)
    return Plan(rank, jnp.array([0, len(rank)], jnp.int32), base=zero[None], offset=zero, supply=supply)


def no_plan(count: int, shards: int) -> Plan:
    """The plan of a draw without a row."""
    zero = jnp.int32(0)
    return Plan(jnp.full((count,), NONE), jnp.zeros((shards + 1,), jnp.int32), jnp.zeros((shards,), jnp.int32), zero)


def sample_ranks(key: jax.Array, words: jax.Array, total: jax.Array, count: int, most: int) -> jax.Array:
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
      most: that `total` can be.
    """
    return lax.cond(
        total < 4 * count,
        lambda: _by_permutation(words, total, count),
        lambda: _by_rejection(key, words, total, count, most),
    )


def _by_permutation(words: jax.Array, total: jax.Array, count: int) -> jax.Array:
    integer = jnp.arange(4 * count, dtype=jnp.int32)
    # 64 random bits each: ties, which would favour small integers, have probability below 1e-12 at count = 1024.
    outside, _, _, integer = lax.sort((integer >= total, words[0], words[1], integer), num_keys=3)
    return jnp.sort(jnp.where(outside, NONE, integer)[:count])


def _by_rejection(key: jax.Array, words: jax.Array, total: jax.Array, count: int, most: int) -> jax.Array:
    n = 2 * count

    def attempt(words: jax.Array) -> jax.Array:
        value, position = sort.ascending(random.below(words, total), most)
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
    share, more, spare = _even_shares(sizes, count)
    # A stable order of the classes that can take one more, random among themselves.
    order = jnp.argsort(jnp.where(more, words >> 1, jnp.uint32(2**31)))
    return share.at[order].add((jnp.arange(len(sizes)) < spare).astype(share.dtype))


def expected_shares(sizes: jax.Array, count: jax.Array | int) -> jax.Array:
    """What `fair_shares` gives each class on average over its random words: float32 `[K]`."""
    share, more, spare = _even_shares(sizes, count)
    return share + jnp.where(more, spare / jnp.maximum(jnp.sum(more), 1), 0.0)


def _even_shares(sizes: jax.Array, count: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What every class certainly gets, int32 `[K]`; which ones could get one row more, bool `[K]`; and how many of them do."""
    ascending = jnp.sort(sizes)
    k = sizes.shape[0]
    before = jnp.cumsum(ascending, dtype=jnp.int32) - ascending
    # With the i smallest classes exhausted the others can be filled to level[i]; the first class it does not exhaust decides.
    level = (count - before) // (k - jnp.arange(k, dtype=jnp.int32))
    stops = level < ascending
    level = jnp.where(jnp.any(stops), level[jnp.argmax(stops)], NONE)
    share = jnp.minimum(sizes, level)
    return share, sizes > level, jnp.where(level == NONE, 0, count - jnp.sum(share))


def _subset_of_each(
    key: jax.Array, words: jax.Array, held: jax.Array, share: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of every class that holds T = `held` rows, m = `share` of the numbers 0..T-1, uniform over the subsets (int32 `[K]`).

    A class with at most 3 m rows permutes them. A larger one draws 3 m numbers with replacement and keeps the first m distinct
    ones; in the rare case of fewer it draws again, alone. Every step treats all numbers of a class alike. One sort of 3 R.

    Args:
      key: for drawing again.
      words: uint32 `[2, 3 * count]`, random.
      count: R, at least the sum of the shares.

    Returns:
      numbers and their classes int32 `[R]`, class by class, and whether there is such a row, bool `[R]`.
    """
    n, classes = 3 * count, held.shape[0]
    permuted, tried = held <= 3 * share, jnp.minimum(held, 3 * share)
    until, begin = jnp.cumsum(share, dtype=jnp.int32), jnp.cumsum(tried, dtype=jnp.int32) - tried

    def class_of(until: jax.Array, position: jax.Array) -> jax.Array:
        return jnp.searchsorted(until, position, side="right", method="scan_unrolled").astype(jnp.int32)

    trial, position = jnp.arange(n, dtype=jnp.int32), jnp.arange(count, dtype=jnp.int32)
    found = class_of(begin + tried, trial)  # the class of each trial; K for none
    of, label = jnp.minimum(found, classes - 1), jnp.minimum(class_of(until, position), classes - 1)
    mixed, last, real = permuted[of], until[label] - 1, position < until[-1]

    def attempt(words: jax.Array) -> jax.Array:
        """The number of each position; -1 for the last ones of a class with too few."""
        number = jnp.where(mixed, trial - begin[of], random.below(words, jnp.maximum(held[of], 1)))
        # What is permuted by 64 random bits each; what is drawn by its number, equal ones in the order of drawing.
        low = jnp.where(mixed, words[0], number.astype(jnp.uint32))
        high = jnp.where(mixed, words[1], trial.astype(jnp.uint32))
        group, low, _, row = lax.sort((found, low, high, trial), num_keys=3)
        repeated = jnp.concatenate([jnp.zeros((1,), bool), (group[1:] == group[:-1]) & (low[1:] == low[:-1])])
        sorted_to = jnp.zeros((n,), jnp.int32).at[row].set(2 * trial + repeated, unique_indices=True)
        fresh = mixed | (sorted_to % 2 == 0)
        ahead = jnp.cumsum(fresh, dtype=jnp.int32) - fresh
        nth = jnp.where(mixed, sorted_to // 2 - begin[of], ahead - ahead[begin[of]])
        kept = fresh & (nth < share[of]) & (found < classes)
        to = jnp.where(kept, (until - share)[of] + nth, count + trial)
        return jnp.full((count,), -1, jnp.int32).at[to].set(number, mode="drop", unique_indices=True)

    def incomplete(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(real & (carry[1][last] < 0))

    def again(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        key, number = random.fold_in(carry[0], jnp.int32(1)), carry[1]
        return key, jnp.where(number[last] < 0, attempt(random.words(key, n)), number)

    return lax.while_loop(incomplete, again, (key, attempt(words)))[1], label, real
