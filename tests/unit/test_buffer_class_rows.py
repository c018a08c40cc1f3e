"""Rows of each class: what shards count, and what a draw is expected to hold."""

import jax
import numpy as np
import pytest

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import POLICIES, Rows, make_buffer
from jaxcl.errors import UserError
from tests import oracle

K, BATCH, DRAWS = 5, 16, 400
RECORD = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), oracle.record_of(np.arange(1)))


def buffer_of(mesh, policy="reservoir", capacity=40, representatives=16, **options):
    options = {"num_classes": K, "accept": 0.5, "count_classes": True} | options
    return make_buffer(RECORD, capacity=capacity, representatives=representatives, policy=policy, mesh=mesh, **options)


def rows_of(mesh, ids, label):
    rows = Rows(oracle.record_of(ids), label.astype(np.int32), ids.astype(np.int32), ids % 7 != 3)
    return mesh_lib.shard_rows(mesh, rows)


def filled(buffer, mesh, batches=8):
    """Rows whose classes are uneven, some of them not valid."""
    state, rng = buffer.init(), np.random.default_rng(0)
    for t in range(batches):
        label = np.minimum(rng.geometric(0.4, BATCH) - 1, K - 1)
        state = buffer.insert(state, rows_of(mesh, t * BATCH + np.arange(BATCH), label), jax.random.key(t))
    return state


def held(buffer, state):
    return np.array(buffer.stats(state)["class_histogram"])


@pytest.mark.parametrize("policy", POLICIES)
def test_shards_count_what_they_hold(policy, mesh_of):
    mesh = mesh_of(4)
    buffer = buffer_of(mesh, policy)
    state = buffer.init()
    rng = np.random.default_rng(0)
    for t in range(12):
        label = np.minimum(rng.geometric(0.4, BATCH) - 1, K - 1)
        state = buffer.insert(state, rows_of(mesh, t * BATCH + np.arange(BATCH), label), jax.random.key(t))
        np.testing.assert_array_equal(np.asarray(state.class_rows).sum(0), held(buffer, state))
    label, ident = (np.asarray(x).reshape(4, -1) for x in (state.label, state.id))
    for shard in range(4):
        wanted = np.bincount(label[shard][ident[shard] >= 0], minlength=K)
        np.testing.assert_array_equal(state.class_rows[shard], wanted)


def test_labels_that_are_no_classes_are_not_counted(mesh_of):
    mesh = mesh_of(2)
    buffer = buffer_of(mesh)
    label = np.array([-1, 0, 4, 5, 2**31 - 1, 4, 1, -(2**31)] * 2)
    state = buffer.insert(buffer.init(), rows_of(mesh, np.arange(BATCH) * 7, label), jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(state.class_rows).sum(0), [2, 2, 0, 0, 4])
    state = buffer.remove(state, np.arange(BATCH) * 7)
    assert not np.asarray(state.class_rows).any()


def test_counts_follow_the_rows_that_are_removed_and_those_that_move(tmp_path, mesh_of):
    mesh = mesh_of(4)
    buffer = buffer_of(mesh, "class_random")
    state = filled(buffer, mesh)
    state = buffer.remove(state, np.asarray(state.id)[::3])
    np.testing.assert_array_equal(np.asarray(state.class_rows).sum(0), held(buffer, state))
    buffer.save(state, tmp_path / "rows")
    for shards in (4, 2):
        other = buffer_of(mesh_of(shards), "class_random")
        moved = other.load(tmp_path / "rows")
        np.testing.assert_array_equal(np.asarray(moved.class_rows).sum(0), held(other, moved))
        label, ident = (np.asarray(x).reshape(shards, -1) for x in (moved.label, moved.id))
        each = [np.bincount(x[i >= 0], minlength=K) for x, i in zip(label, ident, strict=True)]
        np.testing.assert_array_equal(moved.class_rows, each)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exchange": "balance"},
        {"exchange": "local"},
        {"memory": "replicated"},
        {"memory": "independent"},
        {"sampling": "class_balanced"},
        {"sampling": "class_balanced", "exchange": "local"},
        {"representatives": 40, "sampling": "class_balanced"},
    ],
    ids=lambda options: "-".join(str(x) for x in options.values()) or "mix",
)
def test_a_draw_holds_as_many_rows_of_each_class_as_expected(options, mesh_of):
    """The mean of many draws, within five of its standard errors in each class: a false alarm in 2e5 tests of five classes."""
    mesh = mesh_of(4)
    buffer = buffer_of(mesh, "class_random", **options)
    state = filled(buffer, mesh, batches=3)
    found = np.asarray(buffer.expected(state))

    def count(key):
        drawn = buffer.draw(state, key)
        return (jax.nn.one_hot(drawn.label, K) * drawn.valid[:, None]).sum(0)

    counts = np.asarray(jax.jit(lambda keys: jax.lax.map(count, keys))(jax.random.split(jax.random.key(3), DRAWS)))
    error = 5 * counts.std(0) / np.sqrt(DRAWS) + 1e-4
    assert (np.abs(counts.mean(0) - found) <= error).all(), (counts.mean(0), found, error)
    assert found.sum() == pytest.approx(counts.sum(1).mean(), rel=1e-5)


def test_an_empty_memory_expects_nothing(mesh_of):
    buffer = buffer_of(mesh_of(2), sampling="class_balanced", policy="class_balanced")
    np.testing.assert_array_equal(buffer.expected(buffer.init()), np.zeros(K))


def test_classes_are_counted_only_if_asked_for_and_known(mesh_of):
    buffer = buffer_of(mesh_of(2), count_classes=False)
    assert buffer.init().class_rows is None
    with pytest.raises(UserError, match=r"buffer.count_classes: False is not allowed, give True"):
        buffer.expected(buffer.init())
    with pytest.raises(UserError, match=r"buffer.num_classes: None is not allowed, give a positive integer, which"):
        buffer_of(mesh_of(2), num_classes=None)
