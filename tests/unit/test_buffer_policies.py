"""The policies one by one: any sequence of inserts, what each promises, and faults that other libraries have.

Statistical tests fix their seeds and reject at a level of 1e-4 or less.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from configs import digits
from jaxcl import mesh as mesh_lib
from jaxcl.buffer import POLICIES, Rows, make_buffer, selection, shard
from jaxcl.buffer.policy import make_policy
from jaxcl.errors import UserError
from jaxcl.mesh import AXIS
from jaxcl.training.loop import train_and_evaluate
from tests import oracle

K, BATCH, CAPACITY, SHARDS = 4, 6, 20, 3  # shards of 7, 7 and 6 rows


@functools.cache
def policy_of(name):
    rule = make_policy(name, capacity=CAPACITY, shards=SHARDS, num_classes=K, accept=0.4)
    return rule, jax.jit(rule.init), jax.jit(rule.choose), jax.jit(rule.locate), jax.jit(rule.size)


# Classes 0 and 1 by far the most frequent; None is an invalid row.
rows = st.lists(st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3, None]), min_size=BATCH, max_size=BATCH)


@pytest.mark.parametrize("policy", POLICIES)
@hypothesis.settings(max_examples=40)
@hypothesis.given(
    batches=st.lists(rows, min_size=1, max_size=8), me=st.integers(0, SHARDS - 1), seed=st.integers(0, 99)
)
def test_any_sequence_of_inserts(policy, batches, me, seed):
    """Every slot as a loop over the rows leaves it; ranks name the stored rows, class by class where that is promised."""
    rule, init, choose, locate, size = policy_of(policy)
    one, label_of, came = oracle.make(policy, me, CAPACITY, SHARDS, K), {}, np.zeros(K, int)
    meta, stored = init(jnp.int32(me)), {}
    for step, batch in enumerate(batches):
        label = np.array([0 if k is None else k for k in batch], np.int32)
        valid = np.array([k is not None for k in batch])
        ids = step * BATCH + np.arange(BATCH)
        label_of |= dict(zip(ids.tolist(), label.tolist(), strict=True))
        key = jax.random.fold_in(jax.random.key(seed), step)
        slots, meta = choose(meta, key, jnp.int32(me), label, valid)
        stored |= {int(s): int(i) for s, i in zip(slots, ids, strict=True) if s < rule.slots}  # the last one wins
        oracle.insert(one, ids, label, valid, key, 0.4)
        came += np.bincount(label[valid], minlength=K)
        assert stored == one.slots
        n = int(size(meta, jnp.int32(me)))
        located = np.asarray(locate(meta, jnp.int32(me), jnp.arange(rule.slots, dtype=jnp.int32)))[:n].tolist()
        assert sorted(located) == sorted(stored) and n == len(stored)
        held = np.bincount([label_of[i] for i in stored.values()], minlength=K)
        if rule.class_sizes is not None:
            np.testing.assert_array_equal(rule.class_sizes(meta), held)
            in_order = [label_of[stored[slot]] for slot in located]
            assert in_order == sorted(in_order)
        room = oracle.share(me, CAPACITY, SHARDS)
        if policy != "class_random":
            assert n == min(room, came.sum())
        if policy == "class_balanced" and n == room:  # max-min fair, whatever came
            assert all(held[k] >= min(came[k], held.max() - 1) for k in range(K))


def run_stream(rule, key, label):
    """The rows a shard holds after a stream of labels in batches of `BATCH`; slots hold numbers of arrival."""

    def insert(carry, x):
        meta, slots = carry
        key, label, ids = x
        slot, meta = rule.choose(meta, key, jnp.int32(0), label, jnp.ones(BATCH, bool))
        return (meta, slots.at[shard.keep_last(slot, rule.slots)].set(ids, mode="drop")), slots

    label = jnp.asarray(label, jnp.int32).reshape(-1, BATCH)
    start = rule.init(jnp.int32(0)), jnp.full((rule.slots,), -1)
    ids = jnp.arange(label.size).reshape(label.shape)
    return jax.lax.scan(insert, start, (jax.random.split(key, len(label)), label, ids))[0][1]


def test_class_balanced_samples_each_class_uniformly():
    """3,000 shards of 9 rows: of a class that filled the memory alone and then shrank, every row is equally likely."""
    rule = make_policy("class_balanced", capacity=9, shards=1, num_classes=3)
    label = np.array([0] * 24 + [1, 0, 1, 0, 1, 1] * 2 + [2, 1, 0, 2, 1, 0, 2, 2, 2, 1, 1, 0])
    slots = np.asarray(
        jax.jit(jax.vmap(lambda key: run_stream(rule, key, label)))(jax.random.split(jax.random.key(3), 3000))
    )
    rng = np.random.default_rng(0)
    for k in range(3):
        of_class = np.flatnonzero(label == k)
        mine = np.isin(slots, of_class)
        assert (mine.sum(axis=1) == 3).all()
        # One random row a shard, so that the picks are independent and the chi-square law exact.
        pick = np.where(mine, rng.random(mine.shape), -1).argmax(axis=1)
        picked = np.bincount(slots[np.arange(len(slots)), pick], minlength=len(label))[of_class]
        assert picked.sum() == len(slots) and stats.chisquare(picked).pvalue > 1e-4


def test_class_balanced_uses_the_whole_memory_and_evicts_only_the_surplus():
    """From the first class on the memory is full; a new class costs the old ones exactly what it gains."""
    rule = make_policy("class_balanced", capacity=40, shards=1, num_classes=50)
    choose, me = jax.jit(rule.choose), jnp.int32(0)
    meta, stored = rule.init(me), {}
    for step, k in enumerate(np.repeat([7, 3, 49, 0], 20)):
        before = dict(stored)
        slots, meta = choose(meta, jax.random.key(step), me, jnp.full(BATCH, k, jnp.int32), jnp.ones(BATCH, bool))
        for slot in slots[slots < 40].tolist():
            stored[slot] = int(k)
        sizes = np.asarray(rule.class_sizes(meta))
        assert sizes.sum() == min(40, (step + 1) * BATCH) == len(stored)
        lost = [old for slot, old in before.items() if stored[slot] != old]
        assert len(lost) <= BATCH and k not in lost
        assert all(sizes[old] >= sizes.max() - 1 for old in lost)
    assert sorted(sizes[sizes > 0]) == [10] * 4


@pytest.mark.parametrize("stream", ["sorted", "skewed"])
def test_class_balance_does_not_collapse(stream):
    """Mammoth's `balancoir` counts empty slots as class 0 and can end with one class only."""
    rule = make_policy("class_balanced", capacity=50, shards=1, num_classes=10)
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(10), 120) if stream == "sorted" else np.minimum(rng.geometric(0.4, 1200) - 1, 9)
    slots = np.asarray(jax.jit(lambda key: run_stream(rule, key, label))(jax.random.key(0)))
    held, came = np.bincount(label[slots], minlength=10), np.bincount(label, minlength=10)
    assert held.max() - 1 <= held[came >= held.max()].min() and (held >= np.minimum(came, 5)).all()


def test_a_resumed_reservoir_goes_on_counting(tmp_path):
    """10,000 rows seen, saved, loaded, ten batches of 20 more: Mammoth then replaces 51 % of the buffer, for 2 %."""
    record = jax.ShapeDtypeStruct((), np.int32)
    buffer = make_buffer(record, capacity=200, representatives=1)
    insert = jax.jit(buffer.insert)

    def give(state, first, batches, n):
        for step in range(batches):
            ids = jnp.arange(first + step * n, first + (step + 1) * n, dtype=jnp.int32)
            key = jax.random.fold_in(jax.random.key(0), first + step)
            state = insert(state, Rows(ids, ids % K, ids, jnp.ones(n, bool)), key)
        return state

    leaves, tree = jax.tree.flatten(give(buffer.init(), 0, 20, 500))
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as file:
        loaded = [file[f"arr_{n}"] for n in range(len(leaves))]
    state = give(jax.tree.unflatten(tree, [jnp.asarray(x) for x in loaded]), 10_000, 10, 20)
    replaced = np.mean(np.asarray(state.id) >= 10_000)
    assert 0 < replaced < 0.065  # expected 1.96 %; above 6.5 % in 1e-4 of the cases


def first_come(budget):
    """A policy from outside the package: rows are stored until the shard is full, and none after that."""
    ring = POLICIES["fifo"](budget)

    def choose(meta, key, shard, label, valid):
        number = meta["fill"][0] + jnp.cumsum(valid, dtype=jnp.int32) - valid
        _, meta = ring.choose(meta, key, shard, label, valid)
        return jnp.where(valid & (number < budget.room(shard)), number, budget.slots), meta

    return ring._replace(choose=choose)


def test_a_policy_from_outside():
    buffer = make_buffer(
        jax.ShapeDtypeStruct((), np.int32), capacity=9, representatives=1, policy=f"{__name__}:first_come"
    )
    state = buffer.init()
    for ids in np.arange(20, dtype=np.int32).reshape(4, 5):
        state = buffer.insert(state, Rows(ids, ids, ids, np.ones(5, bool)), jax.random.key(0))
    assert state.id.tolist() == list(range(9))
    with pytest.raises(UserError, match=r"buffer.policy: 'nowhere:lru' cannot be imported"):
        make_policy("nowhere:lru", capacity=9, shards=1)


# Repeats


def make_distinct(devices, policy, capacity=12, num_ids=40, memory="sharded"):
    mesh = mesh_lib.make_mesh(jax.devices()[:devices]) if devices else None
    record = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), oracle.record_of(np.arange(1)))
    buffer = make_buffer(
        record, capacity=capacity, representatives=8, policy=policy, num_classes=K, accept=0.4, mesh=mesh,
        repeats="distinct", num_ids=num_ids, memory=memory,
    )  # fmt: skip
    place = (lambda x: mesh_lib.shard_rows(mesh, x)) if mesh else (lambda x: jax.tree.map(jnp.asarray, x))
    return buffer, jax.jit(buffer.insert, donate_argnums=0), place


@pytest.mark.parametrize("devices", [0, 1, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_distinct_is_the_policy_on_rows_not_yet_stored(policy, devices):
    """No id is stored twice in the union, on whatever devices it arrives; what is refused changes nothing."""
    shards, n = max(devices, 1), 4
    buffer, insert, place = make_distinct(devices, policy)
    shadow = [oracle.make(policy, s, 12, shards, K) for s in range(shards)]
    state, rng = buffer.init(), np.random.default_rng(devices)
    refused = again = 0
    ever: set[int] = set()
    for step in range(25):
        ids = rng.integers(0, 40, shards * n).astype(np.int32)
        valid = rng.random(ids.shape) < 0.8
        key = jax.random.key(step)
        state = insert(state, place(Rows(oracle.record_of(ids), ids % K, ids, valid)), key)
        held = {i for one in shadow for i in one.slots.values()}
        offered = np.array(
            [
                v and i not in held and i not in ids[:j][valid[:j]]
                for j, (i, v) in enumerate(zip(ids, valid, strict=True))
            ]
        )
        refused += (valid & ~offered).sum()
        for s, one in enumerate(shadow):
            mine = slice(s * n, (s + 1) * n)
            oracle.insert(one, ids[mine], ids[mine] % K, offered[mine], jax.random.fold_in(key, s), 0.4)
        stored = np.asarray(state.id).reshape(shards, -1)
        assert [{s: int(i) for s, i in enumerate(row) if i >= 0} for row in stored] == [one.slots for one in shadow]
        union = stored[stored >= 0]
        assert len(set(union)) == len(union)
        again += len((set(union.tolist()) - held) & ever)
        ever |= set(union.tolist())
    assert refused > 10
    assert again > 0 or policy == "herding"  # an id that was overwritten may come back


@pytest.mark.parametrize("memory", ["replicated", "independent"])
def test_distinct_on_every_device(memory):
    """Where every device is given all rows, each holds at most one copy of an id, and fills up with those of all devices."""
    buffer, insert, place = make_distinct(4, "reservoir", memory=memory)
    state, rng = buffer.init(), np.random.default_rng(0)
    for step in range(6):
        ids = rng.integers(0, 40, 16).astype(np.int32)
        state = insert(state, place(Rows(oracle.record_of(ids), ids % K, ids, np.ones(16, bool))), jax.random.key(step))
    held = np.asarray(state.id).reshape(4, -1)
    assert held.min() >= 0 and all(len(set(row)) == 12 for row in held.tolist())
    assert (len({tuple(row) for row in held.tolist()}) == 1) == (memory == "replicated")


@pytest.mark.parametrize("devices", [0, 4])
def test_distinct_is_in_place_and_flat(devices):
    """Laws 5 and 6 with the look-up of ids."""
    temporaries, flops = [], []
    for capacity in (64, 64 * 256):
        buffer, insert, place = make_distinct(devices, "reservoir", capacity, num_ids=10**6)
        ids = np.arange(8, dtype=np.int32)
        batch = place(Rows(oracle.record_of(ids), ids % K, ids, np.ones(8, bool)))
        compiled = insert.lower(buffer.init(), batch, jax.random.key(0)).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
        flops.append(compiled.cost_analysis()["flops"])
    assert temporaries[0] == temporaries[1] < 10**5
    assert flops[0] == flops[1]


@pytest.mark.slow
def test_repeats_in_training(tmp_path):
    """Two epochs a task, room for everything: copies with "all", every row once with the others."""
    found = {}
    for repeats in ("all", "first_epoch", "distinct"):
        config = digits.get_config()
        config.strategy, config.epochs, config.optimizer.warmup_epochs = "er", 2, 0.0
        config.buffer.policy, config.buffer.capacity, config.buffer.repeats = "reservoir", 4000, repeats
        found[repeats] = train_and_evaluate(config, tmp_path / repeats, devices=jax.devices()[:2], progress=False)
    rows = found["all"]["buffer"]["distinct_ids"]
    assert {name: run["buffer"]["rows"] for name, run in found.items()} == {
        "all": 2 * rows, "first_epoch": rows, "distinct": rows,
    }  # fmt: skip
    assert {run["buffer"]["distinct_ids"] for run in found.values()} == {rows}


# Selection


def greedy(features, mean, quota):
    """Algorithm 4 of iCaRL, word for word, in double precision: row numbers in the order of their choice."""
    chosen: list[int] = []
    features = features.astype(np.float64)
    for k in range(1, min(quota, len(features)) + 1):
        total = features[chosen].sum(axis=0)
        distance = [np.inf if i in chosen else np.linalg.norm(mean - (total + f) / k) for i, f in enumerate(features)]
        chosen.append(int(np.argmin(distance)))
    return chosen


def expected_order(name, features, quota):
    """The best rows of one class, of all that are given."""
    features = features.astype(np.float64)
    if name == "icarl":
        features = features / np.linalg.norm(features, axis=1, keepdims=True)
        return greedy(features, features.mean(axis=0), quota)
    distance = np.linalg.norm(features - features.mean(axis=0), axis=1)
    return np.argsort(distance if name == "closest" else -distance, kind="stable")[:quota].tolist()


@pytest.mark.parametrize("name", selection.SELECTIONS)
def test_rows_are_ranked_among_those_of_all_devices(name):
    """48 rows, 3 of 4 classes, some invalid, one class short of rows, rows that are equal: the oracle's order, on 1 device
    and on 4."""
    n, quota, rng = 48, 9, np.random.default_rng(6)
    features = np.tile(rng.normal(size=(n // 2, 5)).astype(np.float32), (2, 1))  # every row has its equal
    label, valid = np.tile(rng.choice(3, n // 2, p=[0.5, 0.3, 0.2]).astype(np.int32), 2), rng.random(n) < 0.9
    order = rng.permutation(n).astype(np.int32)

    def ranks_on(devices):
        axis = AXIS if devices else None

        def rank(*rows):
            return selection.rank_rows(name, jax.random.key(0), *rows, num_classes=K, quota=quota, axis=axis)

        if devices:
            split = jax.sharding.PartitionSpec(AXIS)
            mesh = mesh_lib.make_mesh(jax.devices()[:devices])
            rank = jax.shard_map(rank, mesh=mesh, in_specs=(split,) * 4, out_specs=split, check_vma=False)
        return np.asarray(jax.jit(rank)(features, label, valid, order))

    ranks = ranks_on(4)
    np.testing.assert_array_equal(ranks, ranks_on(0))
    assert (ranks[~valid] == selection.UNRANKED).all()
    for k in range(3):
        mine = np.flatnonzero((label == k) & valid)
        mine = mine[np.argsort(order[mine])]  # the order of the rows decides among equals
        ranked = mine[np.argsort(ranks[mine], kind="stable")]
        chosen = min(quota, len(mine))
        assert ranks[ranked].tolist() == [*range(chosen), *[selection.UNRANKED] * (len(mine) - chosen)]
        if name != "random":
            assert ranked[:chosen].tolist() == mine[expected_order(name, features[mine], chosen)].tolist()


def test_random_ranks_are_uniform():
    """Of 4,000 keys; the chi-square test rejects a uniform law once in 10,000 seeds."""
    label, valid, order = jnp.array([0, 1, 0, 0, 1, 0, 0]), jnp.arange(7) != 3, jnp.arange(7)

    def rank(key):
        return selection.rank_rows("random", key, jnp.zeros((7, 0)), label, valid, order, num_classes=2, quota=4)

    ranks = np.asarray(jax.jit(jax.vmap(rank))(jax.random.split(jax.random.key(1), 4000)))
    of_class = np.array([0, 2, 5, 6])
    assert (np.sort(ranks[:, of_class], axis=1) == np.arange(4)).all()
    code = ranks[:, of_class] @ (4 ** np.arange(4))
    assert stats.chisquare(np.unique(code, return_counts=True)[1]).pvalue > 1e-4 and len(np.unique(code)) == 24


@pytest.mark.parametrize("memory", ["sharded", "replicated", "independent"])
def test_every_device_keeps_the_rows_it_is_given(memory):
    """`keep` offers a device's rows to no other; a shard that is full gives up the last in rank of its largest class."""
    mesh, devices, room = mesh_lib.make_mesh(jax.devices()[:4]), 4, 6
    capacity = room * devices if memory == "sharded" else room
    buffer = make_buffer(
        jax.ShapeDtypeStruct((), np.int32), capacity=capacity, representatives=4, policy="herding", num_classes=K,
        mesh=mesh, memory=memory,
    )  # fmt: skip
    split, state = jax.sharding.PartitionSpec(AXIS), buffer.init()
    keep = jax.jit(
        jax.shard_map(
            lambda state, rows: buffer.local.keep(state, rows, jax.random.key(0)),
            mesh=mesh, in_specs=(split, split), out_specs=split, check_vma=False,
        )
    )  # fmt: skip
    for task, k in enumerate([2, 0, 3]):
        ids = np.arange(devices * room, dtype=np.int32) + 100 * task
        rows = Rows(ids, np.full(len(ids), k, np.int32), ids, np.ones(len(ids), bool))
        state = keep(state, mesh_lib.shard_rows(mesh, rows))
    held, record = (np.asarray(x).reshape(devices, -1) for x in (state.id, state.record))
    np.testing.assert_array_equal(held, record)
    for device in range(devices):
        best = [100 * task + room * device + rank for task in range(3) for rank in range(2)]
        assert sorted(held[device]) == best


def test_mistakes_are_named():
    record = jax.ShapeDtypeStruct((), np.int32)
    options = {"capacity": 8, "representatives": 2}
    for change, words in (
        ({"repeats": "never"}, ("repeats", "never", "distinct")),
        ({"repeats": "distinct"}, ("buffer.num_ids: None", "repeats")),
        ({"policy": "class_balanced"}, ("class_balanced", "num_classes", "None")),
        ({"policy": "herding", "num_classes": 0}, ("herding", "num_classes", "0")),
    ):
        with pytest.raises(UserError) as error:
            make_buffer(record, **(options | change))
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="selection: 'best' is not allowed"):
        one = jnp.zeros(1, jnp.int32)
        selection.rank_rows("best", jax.random.key(0), jnp.zeros((1, 1)), one, one == 0, one, num_classes=1, quota=1)
