"""Weighted draws: successive sampling over all shards, importance weights, weights that change."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import stats

from jaxcl.buffer import Drawn, Rows, weights
from jaxcl.buffer.draw import NONE
from jaxcl.buffer.make import make_buffer
from jaxcl.buffer.reshard import reshard
from jaxcl.errors import UserError
from tests import oracle
from tests.unit.test_buffer_laws import ALPHA, RECORD, K, check_draw, chi_square, rows_of, setup, stored_ids

DRAWS = 20_000
SIGMA = 3.9  # of a normal law, 1e-4 on both sides
EVEN, MILD = (1.0,) * 6, (0.5, 1.0, 2.0, 3.0, 1.5, 0.25)
SKEWED = (1e-6, 1e6, 1.0, 1e6, 2e6, 1e-6)
PLACES = (0, 1, 9, 70, 75, 599)  # with parents, grandparents and the root alone in common
SOME = (0.0, 2.0, 1.0, 0.0, 0.0, 3.0)


def tree_of(values):
    """The weights of N shards, leaves `[N, ...]`, as a buffer comes to them: `values` float `[N, slots]`, 0 for no row."""
    values = np.asarray(values, np.float32)
    slots = values.shape[1]
    put = jax.vmap(lambda w: weights.put(weights.empty(slots), jnp.arange(slots, dtype=jnp.int32), w))
    return put(jnp.asarray(values))


@functools.cache
def planner(count, replace):
    """Plans over shards that vmap stands for: (key, tree) -> (slots, shards, importance) `[R]`, -1 for no row."""

    def one(key, tree):
        shards = len(tree.positive)

        def local(tree, me):
            over = functools.partial(lax.all_gather, axis_name="shards")
            return weights.make_weighted_plan(key, tree, count, me=me, over=over, replace=replace)

        plan = jax.vmap(local, axis_name="shards")(tree, jnp.arange(shards, dtype=jnp.int32))
        position = jnp.arange(count)
        shard = jnp.searchsorted(plan.first[0], position, side="right") - 1
        nth = position - plan.first[0][shard]
        real = plan.rank[0] != NONE
        slot = jnp.where(real, plan.supply.slot[shard, nth], -1)
        return slot, jnp.where(real, shard, -1), jnp.where(real, plan.supply.importance[shard, nth], 0)

    return jax.jit(jax.vmap(one, in_axes=(0, None)))


@functools.cache
def many(values, shards, count, replace=False, places=None):
    """Drawn rows `[DRAWS, R]`, by their number among `values`, and their importance. Row j is on shard j mod N, in the slot
    number j // N of `places`, all slots if None."""
    each = -(-len(values) // shards)
    places = np.arange(each) if places is None else np.array(places)
    held = np.zeros((shards, places.max() + 1), np.float32)
    for j, w in enumerate(values):
        held[j % shards, places[j // shards]] = w
    keys = jax.random.split(jax.random.key(11), DRAWS)
    slot, shard, importance = (np.asarray(x) for x in planner(count, replace)(keys, tree_of(held)))
    return np.where(slot < 0, -1, np.searchsorted(places, slot) * shards + shard), importance


def ordered_law(values, count):
    """Probability of every ordered sample: each next row by its part of what is left."""
    law = {}
    for sample in itertools.permutations(np.flatnonzero(values).tolist(), count):
        p, left = 1.0, float(sum(values))
        for row in sample:
            p, left = p * values[row] / left, left - values[row]
        law[sample] = p
    return law


def agrees(samples, law):
    """Chi-square of samples against their law; what is too rare to be counted counts together."""
    names = {name: i for i, name in enumerate(law)}
    p = np.array(list(law.values()))
    assert abs(p.sum() - 1) < 1e-6
    observed = np.bincount([names[tuple(s)] for s in samples], minlength=len(p)).astype(float)
    rare = p * len(samples) < 5
    observed, p = np.append(observed[~rare], observed[rare].sum()), np.append(p[~rare], p[rare].sum())
    if p[-1] * len(samples) < 5:
        # P(Poisson(mean) >= 20) < 1e-6 at any mean below 5.
        assert observed[-1] < 20
        observed, p = observed[:-1], p[:-1]
    if len(p) < 2:
        return True
    expected = p / p.sum() * observed.sum()
    return stats.chisquare(observed, expected).pvalue > ALPHA


@pytest.mark.parametrize("places", [None, PLACES], ids=["flat", "deep"])
@pytest.mark.parametrize("values", [EVEN, MILD, SKEWED], ids=["even", "mild", "skewed"])
def test_the_order_of_a_draw_is_successive_sampling(values, places):
    rows, _ = many(values, 1, 3, places=places)
    assert agrees(rows, ordered_law(values, 3))


@pytest.mark.parametrize("shards", [2, 4, 8])
@pytest.mark.parametrize("values", [MILD, SKEWED], ids=["mild", "skewed"])
def test_subsets_over_all_shards_are_those_of_one(values, shards):
    """Every subset of the union; shards of one row, and of none, among them."""
    rows, _ = many(values, shards, 3)
    law = {}
    for sample, p in ordered_law(values, 3).items():
        law[tuple(sorted(sample))] = law.get(tuple(sorted(sample)), 0.0) + p
    assert agrees(np.sort(rows, axis=1), law)


@pytest.mark.parametrize("shards", [1, 4])
def test_a_deep_tree_draws_its_leaves(shards):
    """300 rows of three weights: those of one weight are equally likely, and none is drawn twice."""
    values = np.random.default_rng(0).permutation(np.repeat([0.01, 1.0, 20.0], 100))
    rows, _ = many(tuple(values.tolist()), shards, 4)
    assert all(len(set(row)) == 4 for row in rows) and rows.min() >= 0
    count = np.bincount(rows.reshape(-1), minlength=300)
    assert chi_square(count[values == 1.0]) > ALPHA and chi_square(count[values == 20.0]) > ALPHA


@pytest.mark.parametrize("shards", [1, 4])
def test_a_row_of_no_weight_is_never_drawn(shards):
    """Three rows of four that are asked for; with no weight at all, none."""
    rows, importance = many(SOME, shards, 4)
    assert all(sorted(row) == [-1, 1, 2, 5] for row in rows[:200])
    np.testing.assert_allclose(importance[rows >= 0], 1.0)
    assert (many((0.0,) * 6, shards, 4)[0] == -1).all()
    rows, _ = many(SOME, shards, 4, replace=True)
    assert set(rows.reshape(-1)) == {1, 2, 5}
    assert (many((0.0,) * 6, shards, 4, replace=True)[0] == -1).all()


@pytest.mark.parametrize(("shards", "places"), [(1, PLACES), (4, None)])
@pytest.mark.parametrize("values", [MILD, SKEWED], ids=["mild", "skewed"])
def test_draws_with_replacement_are_in_proportion_and_independent(values, shards, places):
    rows, _ = many(values, shards, 2, replace=True, places=places)
    p = np.array(values) / sum(values)
    law = {}
    for a, b in itertools.product(range(6), repeat=2):
        law[tuple(sorted((a, b)))] = law.get(tuple(sorted((a, b))), 0.0) + p[a] * p[b]
    assert agrees(np.sort(rows, axis=1), law)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("values", [EVEN, MILD, (4.0, 0.0, 1.0, 1.0, 0.0, 2.0)], ids=["even", "mild", "some"])
def test_importance_makes_the_mean_unbiased(values, shards, replace):
    """Of every row: its expected part of the weighted mean is 1 / M."""
    rows, importance = many(values, shards, 2, replace)
    held = np.flatnonzero(values)
    part = np.stack([np.sum(importance * (rows == j), axis=1) / 2 for j in held])
    error = (part.mean(axis=1) - 1 / len(held)) / (part.std(axis=1) / np.sqrt(DRAWS))
    assert np.abs(error).max() < SIGMA


def test_arrivals_are_exponential():
    """Against the quantiles of the law, its far ends included, and no time of 0 or without end."""
    words = np.concatenate([np.arange(2**16, dtype=np.uint32) * 2**16 + 2**15, [0, 1, 2**32 - 1]]).astype(np.uint32)
    time = np.asarray(weights.arrivals(jnp.asarray(words), jnp.ones(words.shape)), np.float64)
    exact = -np.log1p(-(words.astype(np.float64) + 0.5) / 2**32)
    np.testing.assert_allclose(time[:-1], exact[:-1], rtol=3e-3)
    np.testing.assert_allclose(time[: 2**15], exact[: 2**15], rtol=3e-7)
    assert 0 < time[-3] < 2e-10 and 16 < time[-1] < 23


# The tree.


def check_tree(tree, leaves):
    """Every node is the sum of its children; how many are positive."""
    level = np.asarray(leaves, np.float64)
    for found in tree.levels:
        np.testing.assert_allclose(found, level, rtol=1e-6)
        level = np.add.reduceat(level, np.arange(0, len(level), weights.RADIX))
    assert int(tree.positive[0]) == np.count_nonzero(leaves)


@pytest.mark.parametrize("slots", [1, 16, 17, 300, 5000])
def test_the_tree_is_the_sums_of_its_leaves(slots):
    """Many updates, some out of range, some to 0, against NumPy; and the very bits of a tree that is built at once."""
    rng, put = np.random.default_rng(slots), jax.jit(weights.put, donate_argnums=0)
    tree, leaves, greatest = weights.empty(slots), np.zeros(slots, np.float32), 0.0
    for _ in range(30):
        slot = rng.permutation(slots + 8)[:9].astype(np.int32)
        weight = (10.0 ** rng.uniform(-6, 6, len(slot)) * (rng.random(len(slot)) < 0.8)).astype(np.float32)
        inside = slot < slots
        leaves[slot[inside]] = weight[inside]
        greatest = max(greatest, weight[inside].max(initial=0.0))
        tree = put(tree, slot, weight)
        check_tree(tree, leaves)
    assert tree.greatest[0] == np.float32(greatest)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(weights.build(leaves[None], greatest)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_extreme_weights_are_bounded():
    values = np.array([1e-45, 1e-38, 3e38, 0.0, 1.0], np.float32)
    tree = tree_of(values[None])
    np.testing.assert_array_equal(tree.levels[0][0], np.float32([2.0**-64, 2.0**-64, 2.0**64, 0, 1]))
    rows, importance = many(tuple(values.tolist()), 1, 4)
    assert sorted(rows[0]) == [0, 1, 2, 4] and np.isfinite(importance).all()
    assert (rows[:, 0] == 2).all() and (rows[:, 1] == 4).all()


def test_weights_cost_the_same_at_any_capacity():
    """Temporaries of insert, draw and update: nothing copies the leaves."""

    def compiled(capacity):
        buffer = make_buffer(RECORD, capacity=capacity, representatives=8, sampling="weighted")

        def step(state, rows, key):
            state = buffer.insert(state, rows, key)
            drawn = buffer.draw(state, key)
            return buffer.update_weights(state, drawn, drawn.weight * 2), drawn.importance

        rows = jax.tree.map(jnp.asarray, rows_of(np.arange(8)))
        return jax.jit(step, donate_argnums=0).lower(jax.eval_shape(buffer.init), rows, jax.random.key(0)).compile()

    size = [
        compiled(capacity).memory_analysis().temp_size_in_bytes for capacity in (5_000, 8**5)
    ]  # of five levels both
    assert size[1] <= size[0] + 1024, size


# The buffer.


def weighted(devices, capacity=40, representatives=8, **options):
    return setup(devices, "reservoir", capacity, representatives, sampling="weighted", **options)


def offer(ids, weight, valid=None):
    rows = rows_of(ids, valid)
    return Rows(rows.record, rows.label, rows.id, rows.valid, weight=np.asarray(weight, np.float32))


def weights_by_id(state):
    ids, weight = np.asarray(state.id), np.asarray(state.weights.levels[0])
    return dict(zip(ids[ids >= 0].tolist(), weight[ids >= 0].tolist(), strict=True))


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (0, {}),
        (4, {}),
        (8, {"exchange": "balance"}),
        (4, {"exchange": "local"}),
        (4, {"memory": "replicated"}),
        (4, {"memory": "independent"}),
    ],
    ids=str,
)
def test_drawn_rows_carry_their_weights_and_take_new_ones(devices, options):
    """Insert, draw and update, many times, against a dictionary of weights; rows whole and distinct."""
    shards = max(devices, 1)
    buffer, insert, sample, place = weighted(devices, 40, 8, **options)
    update = jax.jit(buffer.update_weights, donate_argnums=0)
    local = options.get("memory") == "independent" or options.get("exchange") == "local"
    rng, state, known = np.random.default_rng(0), buffer.init(), {}
    for turn in range(6):
        ids = 24 * turn + np.arange(24)
        given = (10.0 ** rng.uniform(-3, 3, 24) * (rng.random(24) < 0.8)).astype(np.float32)
        known.update(zip(ids.tolist(), given.tolist(), strict=True))
        state = insert(state, place(offer(ids, given)), jax.random.key(turn))
        copies = list(zip(np.asarray(state.id).tolist(), np.asarray(state.weights.levels[0]).tolist(), strict=True))
        assert all(w == known[i] for i, w in copies if i >= 0) or options.get("memory") == "independent"
        assert buffer.can_draw(state)
        drawn = sample(state, jax.random.key(turn))
        picked = check_draw(drawn, stored_ids(state, devices), 8)
        if not local:
            assert len(set(picked)) == 8
        host = jax.tree.map(np.asarray, drawn)
        slots = len(state.id) // shards
        holder = host.shard if options.get("memory") != "replicated" else np.zeros_like(host.shard)
        np.testing.assert_array_equal(np.asarray(state.id)[holder * slots + host.slot], host.id)
        np.testing.assert_array_equal(np.asarray(state.weights.levels[0])[holder * slots + host.slot], host.weight)
        assert (host.weight > 0).all() and (host.importance > 0).all()
        new = (host.weight * rng.uniform(0.1, 10, 8)).astype(np.float32)
        state = update(state, drawn, place(new))
        np.testing.assert_array_equal(np.asarray(state.weights.levels[0])[holder * slots + host.slot], new)
        known.update(zip(host.id.tolist(), new.tolist(), strict=True))
    trees = [jax.tree.map(lambda x, s=s: np.asarray(x).reshape(shards, -1)[s], state.weights) for s in range(shards)]
    for tree in trees:
        check_tree(tree, tree.levels[0])
    if options.get("memory") == "replicated":
        assert all((x == y).all() for tree in trees for x, y in zip(tree.levels, trees[0].levels, strict=True))


def test_rows_without_a_weight_take_the_greatest_stored():
    buffer, insert, _, place = weighted(0)
    state = insert(buffer.init(), place(rows_of(np.arange(3))), jax.random.key(0))
    assert set(weights_by_id(state).values()) == {1.0}
    state = insert(state, place(offer(np.arange(3, 6), [0.5, 7.0, 9.0], [True, True, False])), jax.random.key(1))
    state = insert(state, place(rows_of(np.arange(6, 9))), jax.random.key(2))
    assert weights_by_id(state) == {0: 1, 1: 1, 2: 1, 3: 0.5, 4: 7, 6: 7, 7: 7, 8: 7}


@pytest.mark.parametrize("devices", [0, 4])
def test_wrong_weights_are_refused_and_counted(devices):
    buffer, insert, sample, place = weighted(devices)
    update = jax.jit(buffer.update_weights, donate_argnums=0)
    wrong = [np.nan, np.inf, -np.inf, -1.0, -0.0, 1e-45, 1.0, 2.0]
    state = insert(buffer.init(), place(offer(np.arange(8), wrong)), jax.random.key(0))
    assert buffer.stats(state)["refused"] == 4 and set(weights_by_id(state)) == {4, 5, 6, 7}
    assert weights_by_id(state)[4] == 0 < weights_by_id(state)[5]
    assert not buffer.can_draw(state)
    drawn = sample(state, jax.random.key(0))
    ids = np.asarray(drawn.id)
    assert sorted(ids[ids >= 0]) == [5, 6, 7]
    state = update(state, drawn, place(np.where(ids == 7, np.nan, 3).astype(np.float32)))
    assert weights_by_id(state) == {4: 0, 5: 3, 6: 3, 7: 2} and buffer.stats(state)["refused"] == 5


def test_an_overwritten_row_keeps_its_successors_weight():
    buffer, insert, sample, place = setup(0, "fifo", 8, 8, sampling="weighted")
    update = jax.jit(buffer.update_weights, donate_argnums=0)
    state = insert(buffer.init(), place(rows_of(np.arange(8))), jax.random.key(0))
    drawn = sample(state, jax.random.key(0))
    state = insert(state, place(rows_of(np.arange(8, 11))), jax.random.key(1))
    state = update(state, drawn, jnp.full((8,), 5.0))
    assert weights_by_id(state) == {**dict.fromkeys(range(8, 11), 1.0), **dict.fromkeys(range(3, 8), 5.0)}


@pytest.mark.parametrize("devices", [0, 4])
def test_weights_by_id_and_the_last_of_several_wins(devices):
    buffer, insert, _, place = weighted(devices, repeats="distinct", num_ids=100)
    update = jax.jit(buffer.update_weights, donate_argnums=0)
    state = insert(buffer.init(), place(rows_of(np.arange(16))), jax.random.key(0))
    ids = np.array([3, 99, -1, 3, 5, 3, 5, 12], np.int32)
    state = update(state, place(ids), place(np.arange(10, 18, dtype=np.float32)))
    expected = {**dict.fromkeys(range(16), 1.0), 3: 15.0, 5: 16.0, 12: 17.0}
    assert weights_by_id(state) == expected


@pytest.mark.parametrize("new", [2, 3])
@pytest.mark.parametrize("policy", ["reservoir", "class_balanced"])
def test_weights_move_with_their_rows(policy, new):
    buffer, insert, _, place = setup(4, policy, 24, 24, sampling="weighted")
    state = insert(buffer.init(), place(offer(np.arange(24), np.arange(24) / 4)), jax.random.key(0))
    host = jax.tree.map(np.asarray, state)
    moved = reshard(host, policy=policy, capacity=24, num_classes=K, old=4, new=new)
    assert weights_by_id(moved) == weights_by_id(state)
    for s in range(new):
        tree = jax.tree.map(lambda x, s=s: x.reshape(new, -1)[s], moved.weights)
        check_tree(tree, tree.levels[0])
    there = setup(new, policy, 24, 24, sampling="weighted")[0]
    assert jax.tree.map(np.shape, moved) == jax.tree.map(np.shape, jax.eval_shape(there.init))
    assert moved.weights.greatest.tolist() == [23 / 4] * new


def refusals():
    plain, rows = make_buffer(RECORD, capacity=40, representatives=8), rows_of(np.arange(4))
    buffer = make_buffer(RECORD, capacity=40, representatives=8, sampling="weighted")
    one, none = np.ones(4, np.float32), np.zeros(4, np.int32)
    drawn = Drawn(oracle.record_of(np.arange(4)), none, none, none > 0, none)
    return {
        "rows.weight": lambda: plain.insert(plain.init(), offer(np.arange(4), one), jax.random.key(0)),
        "float32 [4]": lambda: buffer.insert(buffer.init(), offer(np.arange(4), np.ones(3)), jax.random.key(0)),
        "one of weighted": lambda: plain.update_weights(plain.init(), rows.id, one),
        "repeats=distinct": lambda: buffer.update_weights(buffer.init(), rows.id, one),
        "slot: NoneType": lambda: buffer.update_weights(buffer.init(), drawn, one),
        "weights: float64 [4]": lambda: buffer.update_weights(
            buffer.init(), Drawn(drawn.record, none, none, none > 0, none, slot=none), np.ones(4)
        ),
        "host": lambda: make_buffer(RECORD, capacity=40, representatives=8, sampling="weighted", tier="host"),
    }


def test_what_cannot_be_weighted_is_said():
    for words, call in refusals().items():
        with pytest.raises(UserError) as error:
            call()
        assert words in str(error.value) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize("devices", [4])
def test_weighted_draws_through_the_real_exchange(devices):
    """Every row's chance through buffer, mesh and exchange, on each device, is that of the plan alone."""
    buffer, insert, _, place = weighted(devices, 16, 4)
    values = np.array([8.0, 1, 1, 1, 4, 1, 1, 1, 2, 2, 1, 1], np.float32)
    state = insert(buffer.init(), place(offer(np.arange(12), values)), jax.random.key(0))
    keys = jax.random.split(jax.random.key(2), 3000)
    ids = np.asarray(jax.jit(lambda state, keys: lax.map(lambda key: buffer.draw(state, key).id, keys))(state, keys))
    assert (ids >= 0).all()
    inclusion = np.zeros(12)
    for sample, p in ordered_law(values.tolist(), 4).items():
        inclusion[list(sample)] += p
    hands = np.bincount(ids[:, 1], minlength=12)
    z = (hands - 3000 * inclusion / 4) / np.sqrt(3000 * inclusion / 4 * (1 - inclusion / 4))
    assert np.abs(z).max() < SIGMA + 0.5  # of twelve
