"""Which rows are drawn: a simple random sample of the union, planned alike on every device.

All devices share the key and the N shard sizes, so each computes the same plan and no coordination is needed. Row numbers
("ranks") of the union run through shard 0's rows first, then shard 1's, and so on. Cost O(R log R), R = rows drawn,
whatever the capacity.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NONE = np.iinfo(np.int32).max  # the rank of "no row": sorts behind every real one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """One global draw of R rows, equal on all devices.

    Attributes:
      rank: int32 `[R]`, the drawn ranks of the union in ascending order, `NONE` behind them.
      first: int32 `[N + 1]`; shard s supplies the plan's positions first[s]..first[s+1]-1.
      base: int32 `[N]`, the rank of each shard's first row.
      offset: int32 scalar in [0, N): position p goes to device (p + offset) mod N.
    """

    rank: jax.Array
    first: jax.Array
    base: jax.Array
    offset: jax.Array


def sample_ranks(key: jax.Array, total: jax.Array, count: int) -> jax.Array:
    """`count` distinct integers, uniform over the subsets of [0, total), ascending.

    With fewer than `count` integers all are returned, followed by `NONE`.

    Above 4 * count integers, 2 * count are drawn with replacement and the first `count` distinct ones kept; in the rare case
    of fewer distinct ones all are drawn again, which keeps the law: every step treats all integers alike. Below, the
    4 * count integers are permuted. Neither depends on `total` in cost.
    """
    return lax.cond(
        total < 4 * count,
        lambda: _by_permutation(key, total, count),
        lambda: _by_rejection(key, total, count),
    )


def _by_permutation(key: jax.Array, total: jax.Array, count: int) -> jax.Array:
    integer = jnp.arange(4 * count, dtype=jnp.int32)
    # 64 random bits each: ties, which would favour small integers, have probability below 1e-13.
    high, low = jax.random.bits(key, (2, 4 * count), jnp.uint32)
    outside = integer >= total
    outside, _, _, integer = lax.sort((outside, high, low, integer), num_keys=3)
    return jnp.sort(jnp.where(outside, NONE, integer)[:count])


def _by_rejection(key: jax.Array, total: jax.Array, count: int) -> jax.Array:
    n = 2 * count

    def attempt(key):
        value = jax.random.randint(key, (n,), 0, total)
        value, position = lax.sort((value, jnp.arange(n, dtype=jnp.int32)), num_keys=2)
        repeat = jnp.concatenate([jnp.zeros((1,), bool), value[1:] == value[:-1]])
        # Back to the order of drawing, which ends by marking where the count-th distinct value appeared.
        _, fresh = lax.sort((position, ~repeat), num_keys=1)
        nth = jnp.sum(jnp.cumsum(fresh) < count)
        kept = ~repeat & (position <= nth)
        return jnp.sort(jnp.where(kept, value, NONE))[:count]

    def incomplete(carry):
        _, rank = carry
        return rank[-1] == NONE

    def again(carry):
        key, _ = carry
        key, now = jax.random.split(key)
        return key, attempt(now)

    _, rank = lax.while_loop(incomplete, again, (key, jnp.full((count,), NONE, jnp.int32)))
    return rank


def make_plan(key: jax.Array, sizes: jax.Array, count: int) -> Plan:
    """Plans a draw of `count` rows from shards that hold `sizes` rows (int32 `[N]`)."""
    shards = sizes.shape[0]
    rank_key, offset_key = jax.random.split(key)
    until = jnp.cumsum(sizes, dtype=jnp.int32)
    rank = sample_ranks(rank_key, until[-1], count)
    bounds = jnp.concatenate([jnp.zeros((1,), jnp.int32), until])
    first = jnp.searchsorted(rank, bounds, method="scan_unrolled").astype(jnp.int32)
    offset = jax.random.randint(offset_key, (), 0, shards)
    return Plan(rank=rank, first=first, base=until - sizes, offset=offset)
