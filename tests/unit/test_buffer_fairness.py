"""Classes in the union of the shards, where a shard has fewer rows than classes or a number that does not divide.

Statistical tests fix their seeds and reject at a level of 1e-4.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxcl.buffer import shard
from jaxcl.buffer.policy import Budget, make_policy
from jaxcl.buffer.policy.base import turns
from tests import oracle


@pytest.mark.parametrize("policy", ["class_balanced", "herding"])
def test_many_classes_are_fair_in_the_union(policy):
    """1,623 classes, 3,246 rows, 8 shards of 405 or 406, every class six times at each shard: two rows a class. The shards
    break ties apart, so that all but a few have exactly two, and none has none."""
    classes, capacity, shards, label = 1623, 3246, 8, jnp.arange(1623, dtype=jnp.int32)
    rule = make_policy(policy, capacity=capacity, shards=shards, num_classes=classes)

    @jax.jit
    def sizes(me, keys):
        def insert(meta, key):
            label_now = jax.random.permutation(key, label)
            return rule.choose(meta, key, me, label_now, jnp.ones(classes, bool))[1], None

        stored = jax.lax.scan(insert, rule.init(me), keys)[0]["stored"]
        return stored[0, :classes]

    held = sum(sizes(jnp.int32(s), jax.random.split(jax.random.key(s), 6)) for s in range(shards))
    assert held.sum() == capacity and held.min() >= 1 and held.max() <= 3
    assert (held == 2).sum() >= classes - 2 * shards


def test_turns_deal_every_height_once():
    """Each class has one row of each height in the union."""
    for shards in (1, 2, 3, 8, 12):
        budget = Budget(1000, shards, 50)
        turn = np.stack([np.asarray(turns(budget, jnp.int32(s))) for s in range(shards)])
        assert (np.sort(turn, axis=0) == np.arange(shards)[:, None]).all()
        expected = [[oracle.height(0, k, s, shards) for k in range(50)] for s in range(shards)]
        np.testing.assert_array_equal(turn, expected)


def test_rows_of_a_class_are_equally_likely_where_ties_are_broken():
    """2,000 shards of 4 rows, the second of two: of each class that has 20 rows every one is kept as often as the others."""
    rule, me = make_policy("class_balanced", capacity=8, shards=2, num_classes=3), jnp.int32(1)
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(3), 20)).astype(np.int32)

    def run(key):
        def insert(carry, x):
            meta, slots = carry
            key, label, ids = x
            slot, meta = rule.choose(meta, key, me, label, jnp.ones(6, bool))
            return (meta, slots.at[shard.keep_last(slot, rule.slots)].set(ids, mode="drop")), None

        batches = jax.random.split(key, 10), jnp.asarray(label).reshape(10, 6), jnp.arange(60).reshape(10, 6)
        return jax.lax.scan(insert, (rule.init(me), jnp.full((4,), -1)), batches)[0][1]

    slots = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(5), 2000)))
    rng = np.random.default_rng(1)
    sizes = np.array([[(label[row] == k).sum() for k in range(3)] for row in slots])
    assert (sizes >= 1).all() and (sizes == sizes[0]).all()  # which class has two rows is the shard's turn, not chance
    for k in range(3):
        mine = slots[label[slots] == k].reshape(len(slots), -1)
        one = rng.permuted(mine, axis=1)[:, 0]
        assert stats.chisquare([(one == i).sum() for i in np.flatnonzero(label == k)]).pvalue > 1e-4
