"""A mixture of buffers: every draw has each part's share, and within a part the law is the part's own."""

import functools
import inspect

import jax
import numpy as np
import pytest
from scipy import stats

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows, make_buffer, make_mixture
from jaxcl.errors import UserError
from tests import oracle

K, BATCH, DRAWN = 4, 16, 16
RECORD = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), oracle.record_of(np.arange(1)))
PARTS = {
    "recent": {"share": 1, "policy": "fifo", "capacity": 8},
    "old": {"share": 3, "policy": "reservoir", "capacity": 40},
}


@functools.cache
def mixture_on(shards, **common):
    mesh = mesh_lib.make_mesh(jax.devices()[:shards]) if shards else None
    return make_mixture(RECORD, representatives=DRAWN, parts=PARTS, mesh=mesh, **common)


@functools.cache
def compiled(shards):
    mixture = mixture_on(shards)
    return jax.jit(mixture.insert, static_argnames="into"), jax.jit(mixture.draw)


def rows_of(ids) -> Rows:
    ids = np.asarray(ids, np.int32)
    return Rows(oracle.record_of(ids), (ids % K).astype(np.int32), ids)


def by_part(mixture, values, shards):
    """Of `[R]` values those of each part."""
    values = np.asarray(values).reshape(max(shards, 1), -1)
    edges = np.cumsum([0, *mixture.rows.values()])
    assert values.shape[1] == edges[-1]
    return {name: values[:, a:b].ravel() for name, a, b in zip(mixture.rows, edges, edges[1:], strict=False)}


@pytest.mark.parametrize("shards", [0, 2, 4])
def test_a_draw_has_the_share_of_each_part_and_whole_rows(shards):
    mixture, (insert, draw) = mixture_on(shards), compiled(shards)
    assert sum(mixture.rows.values()) == DRAWN // max(shards, 1)
    assert mixture.rows["old"] == 3 * mixture.rows["recent"]
    state, key = mixture.init(), jax.random.key(0)
    assert not mixture.can_draw(state)
    for i in range(6):
        state = insert(state, rows_of(np.arange(BATCH) + BATCH * i), jax.random.fold_in(key, i))
    drawn = draw(state, key)
    assert drawn.valid.all() and mixture.can_draw(state) and mixture.size(state) == 48
    oracle.assert_whole(drawn.record, drawn.label, drawn.id, K)
    for name, ids in by_part(mixture, drawn.id, shards).items():
        assert len(set(ids)) == len(ids) == DRAWN * PARTS[name]["share"] // 4
        assert set(ids) <= set(np.asarray(state[name].id))
    recent = np.asarray(state["recent"].id)  # each shard keeps the last of those it was given
    assert len(set(recent)) == 8 and (recent >= 80).all()
    assert mixture.stats(state)["old"]["rows"] == 40


def test_a_part_that_is_short_leaves_its_places_empty_and_takes_no_other_rows():
    mixture, (insert, draw) = mixture_on(2), compiled(2)
    state = insert(mixture.init(), rows_of(np.arange(BATCH)), jax.random.key(0), into=("old",))
    assert mixture.parts["recent"].size(state["recent"]) == 0 and mixture.size(state) == BATCH
    drawn = draw(state, jax.random.key(1))
    valid = by_part(mixture, drawn.valid, 2)
    assert not valid["recent"].any() and valid["old"].all() and not mixture.can_draw(state)
    with pytest.raises(UserError, match="into: 'new' is not allowed, give one of recent, old"):
        mixture.insert(state, rows_of(np.arange(BATCH)), jax.random.key(0), into=("new",))


def test_a_part_does_what_it_would_do_alone_with_a_key_of_its_own():
    mixture, (insert, draw), key = mixture_on(2), compiled(2), jax.random.key(3)
    state, together = mixture.init(), mixture.init()
    parts = {name: part.init() for name, part in mixture.parts.items()}
    for i in range(4):
        rows, step = rows_of(np.arange(BATCH) + BATCH * i), jax.random.fold_in(key, i)
        pair = jax.random.split(step)
        state = insert(state, rows, pair[0])
        into = None if i else ("old",)
        together, drawn = mixture.insert_and_draw(together, rows, step, into)
        for number, (name, part) in enumerate(mixture.parts.items()):
            own = jax.random.fold_in(step, number)
            if into and name not in into:
                expected = part.draw(parts[name], own)
            else:
                parts[name], expected = part.insert_and_draw(parts[name], rows, own)
            np.testing.assert_array_equal(by_part(mixture, drawn.id, 2)[name], expected.id)
            np.testing.assert_array_equal(together[name].id, parts[name].id)
    found = draw(state, key)
    for number, (name, part) in enumerate(mixture.parts.items()):
        expected = jax.jit(part.draw)(state[name], jax.random.fold_in(key, number))
        np.testing.assert_array_equal(by_part(mixture, found.id, 2)[name], expected.id)


def test_inside_another_shard_map_the_same_is_drawn():
    mesh, key = mesh_lib.make_mesh(jax.devices()[:2]), jax.random.key(3)
    mixture, (insert, draw) = mixture_on(2), compiled(2)
    state, rows, rows_spec, whole = mixture.init(), rows_of(np.arange(BATCH)), mesh_lib.ROWS, mesh_lib.WHOLE

    def step(state, rows, key):
        state = mixture.local.insert(state, rows, key)
        return state, mixture.local.draw(state, key)

    inside = mesh_lib.on_mesh(mesh, step, (rows_spec, rows_spec, whole), (rows_spec, rows_spec))
    after, found = inside(state, rows, key)
    expected = insert(state, rows, key)
    for x, y in zip(jax.tree.leaves((after, found)), jax.tree.leaves((expected, draw(expected, key))), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("part", PARTS)
def test_within_a_part_every_row_is_equally_likely_and_parts_are_independent(part):
    """Chi-square at 1e-4 over single rows, and over the pairs of one place of each part."""
    mixture, insert, state = mixture_on(2), compiled(2)[0], mixture_on(2).init()
    for i in range(3):
        state = insert(state, rows_of(np.arange(BATCH) + BATCH * i), jax.random.key(i))
    runs = 1200
    drawn = jax.jit(lambda state, keys: jax.lax.map(lambda key: mixture.draw(state, key).id, keys))(
        state, jax.random.split(jax.random.key(9), runs)
    )
    ids = [by_part(mixture, one, 2) for one in np.asarray(drawn)]
    stored = np.sort(np.asarray(state[part].id))
    counts = np.array([np.sum([one[part] == row for one in ids]) for row in stored])
    n, r = len(stored), len(ids[0][part])
    p = r / n  # without replacement the counts' covariance is that of a multinomial times (1 - p) n / (n - 1)
    statistic = ((counts - runs * p) ** 2).sum() / (runs * p * (1 - p)) * (n - 1) / n
    assert stats.chi2.sf(statistic, n - 1) > 1e-4
    recent, old = (np.array([one[name][0] % 4 for one in ids]) for name in ("recent", "old"))
    assert stats.chi2_contingency(np.histogram2d(recent, old, bins=4)[0]).pvalue > 1e-4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"parts": {}}, "parts: {} is not allowed, give at least one, by name"),
        ({"parts": {"a": {"capacity": 8}}}, "parts.a.share: None is not allowed, give a positive integer"),
        ({"parts": {"a": {"share": 0.5, "capacity": 8}}}, "parts.a.share: 0.5 is not allowed"),
        ({"representatives": 20}, "such that of recent, 20 * 1 / 4, is a multiple of the number of devices, 2"),
        ({"representatives": 0}, "representatives: 0 is not allowed, give a positive integer"),
        (
            {"axis": "rows"},
            "parts.recent: buffer.axis: 'rows' is not allowed, give one or several of the mesh's axes, data",
        ),
        ({"policy": "lifo", "parts": {"a": {"share": 1, "capacity": 8}}}, "parts.a: "),
    ],
)
def test_what_cannot_be_is_refused_by_one_line(change, message):
    options = {"representatives": 16, "parts": PARTS, "mesh": mesh_lib.make_mesh(jax.devices()[:2]), **change}
    with pytest.raises(UserError) as error:
        make_mixture(RECORD, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_options_in_common_are_those_of_every_part_without_its_own():
    parts = {"a": {"share": 1}, "b": {"share": 1, "capacity": 12}}
    mixture = make_mixture(RECORD, representatives=4, parts=parts, capacity=6, policy="fifo")
    assert [part.capacity for part in mixture.parts.values()] == [6, 12]
    assert set(inspect.signature(make_mixture).parameters) - {"parts", "common"} <= set(
        inspect.signature(make_buffer).parameters
    )
