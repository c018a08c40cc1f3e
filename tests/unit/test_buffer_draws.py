"""The draws that a plan can be of: by class, with replacement, windows of a stream; under every transformation."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows, draw, make_buffer
from jaxcl.errors import UserError
from tests.unit.test_buffer_laws import ALPHA, chi_square, fill, setup

DRAWS = 20_000


@functools.cache
def many(function, sizes, count):
    """Ranks `[DRAWS, count]` of draws from shards of these sizes, or of these sizes by class."""
    plan = jax.jit(lambda keys: lax.map(lambda key: function(key, jnp.asarray(sizes, jnp.int32), count).rank, keys))
    return np.asarray(plan(jax.random.split(jax.random.key(7), DRAWS)))


def classes_of(sizes):
    """The class of each rank of a union: its shards one after another, and each class by class."""
    return np.concatenate([np.repeat(np.arange(len(row)), row) for row in sizes])


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        (((2, 1, 0), (3, 1, 0)), 4),  # permuted: classes of 5, 2 and no rows
        (((9, 0, 1), (0, 4, 1)), 3),  # drawn again and again where only 2 of 9, or 1 of 4, are wanted
        (((40, 3),), 6),  # one class drawn, one taken whole
        (((10, 10),), 4),  # two of ten each, from four trials: not complete in one draw of 500
    ],
    ids=str,
)
def test_subsets_of_a_class_are_equally_likely(sizes, count):
    """Chi-square over all subsets of each class, among the draws that gave it as many rows; and between two classes."""
    ranks, label = many(draw.make_balanced_plan, sizes, count), classes_of(sizes)
    assert (np.sort(ranks) == ranks).all() and (np.diff(ranks)[ranks[:, 1:] != draw.NONE] > 0).all()
    held = np.bincount(label, minlength=len(sizes[0]))
    found = [collections.Counter() for _ in held]
    for row in ranks:
        row = row[row != draw.NONE]
        for k, counter in enumerate(found):
            counter[tuple(row[label[row] == k])] += 1
    for k, counter in enumerate(found):
        for m, group in itertools.groupby(sorted(counter, key=len), key=len):
            subsets = list(itertools.combinations(np.flatnonzero(label == k), m))
            drawn = np.array([counter[tuple(s)] for s in subsets])
            assert drawn.sum() == sum(counter[s] for s in group)
            if len(subsets) > 1 and drawn.sum() > 5 * len(subsets):
                assert chi_square(drawn) > ALPHA


def test_classes_of_a_balanced_draw_are_independent():
    """One row of each of two classes: every pair is equally likely."""
    ranks, label = many(draw.make_balanced_plan, ((3, 4), (2, 1)), 2), classes_of(((3, 4), (2, 1)))
    pairs = collections.Counter(tuple(row) for row in ranks)
    assert all(set(label[list(pair)]) == {0, 1} for pair in pairs)
    assert len(pairs) == 25 and chi_square(np.array(list(pairs.values()))) > ALPHA


@pytest.mark.parametrize("shards", [1, 5])
def test_a_balanced_draw_gives_each_class_its_share(shards):
    """Any sizes: distinct ranks, and as many of each class as `fair_shares` says within one row."""
    rng, plan = np.random.default_rng(shards), jax.jit(draw.make_balanced_plan, static_argnums=2)
    for trial in range(100):
        sizes = rng.integers(0, rng.integers(1, 40), (shards, 7)) * rng.integers(0, 2, (shards, 7))
        found = plan(jax.random.key(trial), jnp.asarray(sizes, jnp.int32), 24)
        rank, first = np.asarray(found.rank), np.asarray(found.first)
        rank = rank[rank != draw.NONE]
        assert len(set(rank)) == len(rank) == min(24, sizes.sum())
        drawn, held = np.bincount(classes_of(sizes)[rank], minlength=7), sizes.sum(axis=0)
        level = drawn.max(initial=0)
        assert ((drawn == held) | (drawn >= level - 1)).all() and (drawn <= held).all()
        ends = np.cumsum(sizes.sum(axis=1))
        assert first.tolist() == [0, *np.searchsorted(rank, ends)]


def test_the_memory_of_a_balanced_draw_is_linear_in_its_rows():
    def temporaries(count):
        sizes = jax.ShapeDtypeStruct((8, 10), jnp.int32)
        compiled = jax.jit(lambda key, sizes: draw.make_balanced_plan(key, sizes, count)).lower(
            jax.random.key(0), sizes
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 5 * temporaries(512)  # quadratic would be 16


@pytest.mark.parametrize("sizes", [(5,), (1, 0, 4), (30, 0, 3, 1)], ids=str)
def test_draws_with_replacement_are_independent(sizes):
    """Every sequence of two draws, in the order of ranks: twice the probability where they differ."""
    ranks, total = many(draw.make_plan_with_replacement, sizes, 2), sum(sizes)
    assert ranks.min() >= 0 and ranks.max() < total and (ranks[:, 0] <= ranks[:, 1]).all()
    counts = np.zeros((total, total))
    np.add.at(counts, (ranks[:, 0], ranks[:, 1]), 1)
    once = counts[np.triu_indices(total, 1)]
    assert chi_square(np.bincount(ranks.reshape(-1), minlength=total)) > ALPHA
    assert chi_square(np.diag(counts)) > ALPHA and (total == 1 or chi_square(once) > ALPHA)
    twice = np.diag(counts).sum()
    p = 1 / total
    assert abs(twice - DRAWS * p) < 3.9 * np.sqrt(DRAWS * p * (1 - p))
    assert (many(draw.make_plan_with_replacement, (0,) * len(sizes), 2)[:5] == draw.NONE).all()


@pytest.mark.parametrize("devices", [0, 4])
def test_with_replacement_more_may_be_drawn_than_there_are(devices):
    counts = (3, 0, 1, 2) if devices else (6,)
    buffer, insert, sample, place = setup(devices, "reservoir", 20, 64, sampling="uniform_with_replacement")
    state = buffer.init()
    assert not buffer.can_draw(state) and not np.asarray(sample(state, jax.random.key(0)).valid).any()
    state = fill(insert, place, state, counts, max(devices, 1))
    assert buffer.can_draw(state)
    drawn = sample(state, jax.random.key(0))
    assert np.asarray(drawn.valid).all() and set(np.asarray(drawn.id).tolist()) == set(range(6))


# Windows.

TIMED = {"time": jax.ShapeDtypeStruct((), jnp.int32), "x": jax.ShapeDtypeStruct((2,), jnp.uint8)}


@functools.cache
def ring(devices, capacity, length, **options):
    mesh = mesh_lib.make_mesh(jax.devices()[:devices]) if devices else None
    buffer = make_buffer(
        TIMED, capacity=capacity, representatives=8, policy="fifo", mesh=mesh, window=length, time="time", **options
    )
    place = (lambda rows: mesh_lib.shard_rows(mesh, rows)) if mesh else (lambda rows: jax.tree.map(jnp.asarray, rows))
    return buffer, jax.jit(buffer.insert, donate_argnums=0), jax.jit(buffer.draw), place


def steps(times, ids, valid):
    ids = np.asarray(ids, np.int32)
    record = {"time": np.asarray(times, np.int32), "x": np.stack([ids % 251, ids % 7], 1).astype(np.uint8)}
    return Rows(record, (ids % 5).astype(np.int32), ids, np.asarray(valid, bool))


@pytest.mark.parametrize(
    ("devices", "options"),
    [(0, {}), (0, {"sampling": "weighted"}), (4, {}), (4, {"memory": "independent"})],
    ids=str,
)
def test_windows_are_the_rows_that_follow(devices, options):
    """Episodes of random lengths, one stream a device, against a list of each device's last rows."""
    shards, capacity, length = max(devices, 1), 22 if devices else 11, 4
    memory = options.get("memory", "sharded")
    buffer, insert, sample, place = ring(devices, capacity, length, **options)
    rng, state = np.random.default_rng(0), buffer.init()
    assert not np.asarray(sample(state, jax.random.key(0)).valid).any()
    kept, time, lengths, fresh = [[] for _ in range(shards)], np.zeros(shards, int), set(), itertools.count()
    rooms = [len(range(s, capacity, shards)) if memory == "sharded" else capacity for s in range(shards)]
    for turn in range(12):
        rows = []
        for s, _ in itertools.product(range(shards), range(3)):
            # An episode may go on where the next one's first step would have been: a gap in time, or a new beginning.
            time[s] = rng.choice([time[s] + 1, 0, time[s] + 2], p=[0.7, 0.2, 0.1])
            rows.append((int(time[s]), next(fresh), bool(rng.random() < 0.9), s))
        state = insert(state, place(steps(*zip(*[row[:3] for row in rows], strict=True))), jax.random.key(turn))
        for t, ident, valid, s in rows:
            for mine in [s] if memory == "sharded" else range(shards):
                kept[mine] = (kept[mine] + [(t, ident)] * valid)[-rooms[mine] :]
        drawn = jax.tree.map(np.asarray, sample(state, jax.random.key(turn)))
        for i in np.flatnonzero(drawn.valid):
            mine = kept[drawn.shard[i]]
            begin = [ident for _, ident in mine].index(drawn.id[i])
            window = mine[begin : begin + length]
            follows = list(itertools.takewhile(lambda j, w=window: w[j][0] == w[0][0] + j, range(len(window))))
            assert drawn.length[i] == len(follows)
            expected = steps(*zip(*[(*window[j], True) for j in follows], strict=True))
            for name, leaf in expected.record.items():
                np.testing.assert_array_equal(drawn.record[name][i, : len(follows)], leaf)
                assert not drawn.record[name][i, len(follows) :].any()
            assert drawn.label[i] == expected.label[0]
        lengths |= set(drawn.length[drawn.valid].tolist())
        assert not drawn.length[~drawn.valid].any() and not drawn.record["x"][~drawn.valid].any()
    assert lengths == {1, 2, 3, 4}
    assert jax.tree.map(jnp.shape, buffer.no_rows()) == jax.tree.map(jnp.shape, drawn)


def test_a_full_ring_is_one_window_that_ends_at_its_newest_row():
    """The times of the oldest row would fit behind the newest one."""
    buffer, insert, sample, place = ring(0, 11, 11)
    state = insert(buffer.init(), place(steps((np.arange(3) + 5) % 8, range(3), [True] * 3)), jax.random.key(0))
    for turn in range(1, 6):
        ids = np.arange(3 * turn, 3 * turn + 3)
        state = insert(state, place(steps((ids + 5) % 11, ids, [True] * 3)), jax.random.key(turn))
    drawn = jax.tree.map(np.asarray, sample(state, jax.random.key(0)))
    assert len(set(drawn.id)) == 8
    first = drawn.record["time"][:, 0]
    np.testing.assert_array_equal(drawn.length, np.minimum(18 - drawn.id, 11 - first))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": "reservoir"}, ("buffer.window", "4", "policy=fifo")),
        ({"tier": "host"}, ("buffer.window", "4", "tier=device")),
        ({"time": "x"}, ("buffer.time", "'x'", "give the integer", "time")),
        ({"time": None}, ("buffer.time", "None")),
        ({"window": 0}, ("buffer.window", "0", "positive")),
    ],
    ids=str,
)
def test_what_windows_need_is_said(change, words, mesh_of):
    options = {"policy": "fifo", "window": 4, "time": "time", "mesh": mesh_of(1), **change}
    with pytest.raises(UserError) as error:
        make_buffer(TIMED, capacity=8, representatives=4, **options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# Transformations.

EVERY = {
    "class_balanced": ("class_random", {"sampling": "class_balanced"}),
    "uniform_with_replacement": ("reservoir", {"sampling": "uniform_with_replacement"}),
    "weighted": ("reservoir", {"sampling": "weighted"}),
    "weighted_with_replacement": ("reservoir", {"sampling": "weighted_with_replacement"}),
}


@pytest.mark.parametrize("name", EVERY)
def test_draws_in_scan_and_under_vmap_are_the_draws_alone(name):
    policy, options = EVERY[name]
    buffer, insert, sample, place = setup(0, policy, 20, 8, **options)
    state = fill(insert, place, buffer.init(), (13,), 1)
    keys = jax.random.split(jax.random.key(3), 5)
    alone = jax.tree.map(lambda *x: np.stack(x), *[sample(state, key) for key in keys])
    together = jax.jit(jax.vmap(buffer.draw, in_axes=(None, 0)))(state, keys)
    in_turn = jax.jit(lambda state, keys: lax.scan(lambda s, key: (s, buffer.draw(s, key)), state, keys)[1])(
        state, keys
    )
    for found in (together, in_turn):
        for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(alone), strict=True):
            close = np.testing.assert_allclose if "importance" in str(path) else np.testing.assert_array_equal
            close(x, y, **({"rtol": 1e-6} if close is np.testing.assert_allclose else {}))


@pytest.mark.parametrize("name", EVERY)
def test_draws_with_other_generators_and_in_64_bits(name):
    policy, options = EVERY[name]
    buffer, insert, sample, place = setup(0, policy, 20, 8, **options)
    state = fill(insert, place, buffer.init(), (13,), 1)
    for impl in ("rbg", "unsafe_rbg"):
        drawn = sample(state, jax.random.key(0, impl=impl))
        assert np.asarray(drawn.valid).all()
    expected = sample(state, jax.random.key(5))
    with jax.enable_x64(True):
        found = jax.jit(buffer.draw)(state, jax.random.key(5))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_no_gradient_goes_through_a_draw(name):
    policy, options = EVERY[name]
    buffer, insert, _, place = setup(0, policy, 20, 8, **options)
    state = fill(insert, place, buffer.init(), (13,), 1)
    leaves, rebuild = jax.tree.flatten(state)
    real = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(values):
        changed = dict(zip(real, values, strict=True))
        drawn = buffer.draw(rebuild.unflatten([changed.get(i, x) for i, x in enumerate(leaves)]), jax.random.key(0))
        return sum(jnp.sum(x) for x in jax.tree.leaves(drawn) if jnp.issubdtype(x.dtype, jnp.floating))

    gradient = jax.jit(jax.grad(loss))([leaves[i] for i in real])
    assert not any(np.asarray(g).any() for g in gradient)


@pytest.mark.parametrize("most", [300, 2**24, 2**25, 2**25 + 1, 2**31 - 1])
def test_a_plan_does_not_depend_on_how_many_rows_there_could_be(most):
    """Up to 2**25 a row and one of the 128 positions at which it was drawn share a word."""
    plan, sizes = jax.jit(draw.make_plan, static_argnums=(2, 3)), jnp.array([100, 0, 200])
    for key in jax.random.split(jax.random.key(3), 5):
        expected, found = plan(key, sizes, 64, 2**31 - 1), plan(key, sizes, 64, most)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert len(set(np.asarray(found.rank))) == 64 and (np.diff(found.rank) > 0).all()
