"""A buffer that moves to other numbers of devices: every row once, whole, balanced, and every policy goes on from there."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import POLICIES, Rows, make_buffer
from jaxcl.buffer.policy import make_policy
from jaxcl.buffer.reshard import reshard
from jaxcl.errors import UserError
from tests import oracle

K, CAPACITY, BATCH = 5, 43, 16
CHAIN = (8, 4, 2, 8, 1)


@functools.cache
def buffer_on(policy, shards, mesh_of):
    """(buffer, jitted insert, jitted `reached`)."""
    record = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), oracle.record_of(np.arange(1)))
    buffer = make_buffer(
        record, capacity=CAPACITY, representatives=40, policy=policy, num_classes=K, accept=0.5, mesh=mesh_of(shards)
    )
    return buffer, jax.jit(buffer.insert), jax.jit(reached(policy, shards))


def reached(policy, shards):
    """`(state) -> ids [shards, slots]` of the rows that the policy's metadata reaches, -1 behind them."""
    rule = make_policy(policy, capacity=CAPACITY, shards=shards, num_classes=K, accept=0.5)

    def of_shard(me, meta, ids):
        meta, rank = jax.tree.map(lambda x: x[None], meta), jnp.arange(rule.slots, dtype=jnp.int32)
        return jnp.where(rank < rule.size(meta, me), ids[rule.locate(meta, me, rank)], -1)

    return lambda state: jax.vmap(of_shard)(jnp.arange(shards), state.meta, state.id.reshape(shards, -1))


def insert(on, mesh, state, ids, seed):
    """Rows of these ids, padded to a batch."""
    batch = np.full(BATCH, -1, np.int32)
    batch[: len(ids)] = ids
    rows = Rows(oracle.record_of(batch), (batch % K).astype(np.int32), batch, batch >= 0)
    return on[1](state, mesh_lib.shard_rows(mesh, rows), jax.random.key(seed))


def stored(state):
    """Ids, ascending, of a state whose rows are whole."""
    state = jax.device_get(state)
    written = np.flatnonzero(state.id >= 0)
    oracle.assert_whole(jax.tree.map(lambda x: x[written], state.record), state.label[written], state.id[written], K)
    return sorted(state.id[written].tolist())


def move(state, policy, old, new, mesh):
    moved = reshard(jax.device_get(state), policy=policy, capacity=CAPACITY, num_classes=K, old=old, new=new)
    return mesh_lib.split_rows(mesh, moved)


@pytest.mark.parametrize("count", [0, 3, 30, 200])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_row_survives_exactly_once_and_the_shards_are_balanced(policy, count, mesh_of):
    on, mesh = buffer_on(policy, CHAIN[0], mesh_of), mesh_of(CHAIN[0])
    state = on[0].init()
    for i in range(0, count, BATCH):
        state = insert(on, mesh, state, np.arange(i, min(i + BATCH, count)), i)
    for old, new in itertools.pairwise(CHAIN):
        ids = stored(state)
        on, mesh = buffer_on(policy, new, mesh_of), mesh_of(new)
        state = move(state, policy, old, new, mesh)
        # Ids left behind in slots the policy does not count would show here as rows; rows it lost would be missing below.
        assert stored(state) == ids
        sizes = on[0].stats(state)["rows_per_shard"]
        assert max(sizes) - min(sizes) <= 1 and sum(sizes) == len(ids)
        found = np.asarray(on[2](state))
        assert sorted(found[found >= 0]) == ids  # what the policy's metadata reaches, each once
        new_meta, empty_meta = (jax.tree.map(lambda x: (x.shape, x.dtype), s.meta) for s in (state, on[0].init()))
        assert new_meta == empty_meta
    for i in range(1000, 1200, BATCH):  # and it goes on: full, whole, without doubles
        state = insert(on, mesh, state, np.arange(i, i + BATCH), i)
    ids = stored(state)
    found = np.asarray(on[2](state))
    assert len(ids) == len(set(ids)) == CAPACITY and sorted(found[found >= 0]) == ids
    if policy == "fifo":
        assert ids == list(range(1208 - CAPACITY, 1208))
    if policy in ("class_balanced", "herding"):
        histogram = on[0].stats(state)["class_histogram"]
        assert max(histogram) - min(histogram) <= 8


def test_a_ring_goes_on_dropping_the_oldest(mesh_of):
    on = buffer_on("fifo", 8, mesh_of)
    state = on[0].init()
    for i in range(0, 96, BATCH):
        state = insert(on, mesh_of(8), state, np.arange(i, i + BATCH), i)
    state = move(state, "fifo", 8, 4, mesh_of(4))
    state = insert(buffer_on("fifo", 4, mesh_of), mesh_of(4), state, np.arange(96, 112), 0)
    ids = stored(state)  # of the batch 64..79, in which all rows are of one age, five go
    assert len(ids) == CAPACITY and set(ids) >= set(range(80, 112)) and min(ids) >= 64


@pytest.mark.slow
def test_a_moved_reservoir_is_still_a_uniform_sample_of_the_whole_stream(mesh_of):
    """96 rows before the move and 96 after it: each half supplies half of the memory. z < 4: false alarm below 1e-4."""
    counts, runs = np.zeros(192), 150
    eight, four = buffer_on("reservoir", 8, mesh_of), buffer_on("reservoir", 4, mesh_of)
    for run in range(runs):
        state = eight[0].init()
        for i in range(0, 96, BATCH):
            state = insert(eight, mesh_of(8), state, np.arange(i, i + BATCH), 1000 * run + i)
        state = move(state, "reservoir", 8, 4, mesh_of(4))
        for i in range(96, 192, BATCH):
            state = insert(four, mesh_of(4), state, np.arange(i, i + BATCH), 1000 * run + i)
        counts[stored(state)] += 1
    p = CAPACITY / 192
    z = (counts[:96].sum() / 96 / runs - p) / np.sqrt(p * (1 - p) / (96 * runs) / 2)
    assert abs(z) < 4


def test_copies_are_still_refused(mesh_of):
    """`repeats` "distinct": after the move as before it, a row that comes again is known on whatever shard it lies."""
    record = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), oracle.record_of(np.arange(1)))
    options = {"capacity": CAPACITY, "representatives": 16, "repeats": "distinct", "num_ids": 64}
    eight, four = (make_buffer(record, mesh=mesh_of(n), **options) for n in (8, 4))
    state = eight.init()
    for i in range(0, 32, BATCH):
        state = insert((eight, jax.jit(eight.insert)), mesh_of(8), state, np.arange(i, i + BATCH), i)
    state = move(state, "reservoir", 8, 4, mesh_of(4))
    for i in range(0, 48, BATCH):  # the last of them is new
        state = insert((four, jax.jit(four.insert)), mesh_of(4), state, np.arange(i, i + BATCH), 100 + i)
    assert len(set(stored(state))) == len(stored(state)) == CAPACITY


def test_memories_that_are_not_shared(mesh_of):
    ids = np.arange(16, dtype=np.int32)
    record = oracle.record_of(ids[:1])
    for memory in ("replicated", "independent"):
        options = {"capacity": CAPACITY, "representatives": 16, "memory": memory}
        two = make_buffer(jax.tree.map(lambda x: x[0], record), mesh=mesh_of(2), **options)
        rows = Rows(oracle.record_of(ids), ids % K, ids, ids >= 0)
        state = jax.device_get(
            jax.jit(two.insert)(two.init(), mesh_lib.shard_rows(mesh_of(2), rows), jax.random.key(0))
        )
        arguments = {
            "policy": "reservoir",
            "capacity": CAPACITY,
            "num_classes": K,
            "memory": memory,
            "old": 2,
            "new": 4,
        }
        if memory == "independent":
            with pytest.raises(UserError, match=r"devices: 4 is not allowed, give 2, .* independent memory"):
                reshard(state, **arguments)
            continue
        moved = reshard(state, **arguments)
        four = make_buffer(jax.tree.map(lambda x: x[0], record), mesh=mesh_of(4), **options)
        assert four.stats(mesh_lib.split_rows(mesh_of(4), moved))["rows_per_shard"] == [16] * 4


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_can_move(policy):
    assert make_policy(policy, capacity=CAPACITY, shards=2, num_classes=K, accept=0.5).move is not None


def unmoved(budget):
    return POLICIES["fifo"](budget)._replace(move=None)


def test_a_policy_without_a_move_is_refused():
    with pytest.raises(UserError, match=r"devices: 4 is not allowed, give 2, .*:unmoved cannot move"):
        reshard(None, policy=f"{__name__}:unmoved", capacity=CAPACITY, num_classes=K, old=2, new=4)
