"""The seven laws of the buffer (DESIGN: whole rows, uniform, without replacement, one budget, in place, flat, replayable).

Statistical tests fix their seeds; each rejects at a level of 1e-4, so a correct buffer with another seed would fail one
run in about a thousand.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import EXCHANGES, POLICIES, Rows, draw, make_buffer, shard
from jaxcl.buffer.policy import make_policy
from tests import oracle

K = 4
PER_DEVICE = 3  # rows of a batch on each device
RECORD = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), oracle.record_of(np.arange(1)))
ALPHA = 1e-4


@functools.cache
def setup(devices, policy, capacity, representatives, accept=0.4, **options):
    """A buffer on `devices` devices (0: without a mesh) and its compiled functions, shared by all tests."""
    mesh = mesh_lib.make_mesh(jax.devices()[:devices]) if devices else None
    buffer = make_buffer(
        RECORD,
        capacity=capacity,
        representatives=representatives,
        policy=policy,
        num_classes=K,
        accept=accept,
        mesh=mesh,
        **options,
    )
    place = (lambda rows: mesh_lib.shard_rows(mesh, rows)) if mesh else (lambda rows: jax.tree.map(jnp.asarray, rows))
    return buffer, jax.jit(buffer.insert, donate_argnums=0), jax.jit(buffer.draw), place


plan_of = jax.jit(draw.make_plan, static_argnums=2)


def rows_of(ids, valid=None) -> Rows:
    ids = np.asarray(ids, np.int32)
    valid = np.ones(ids.shape, bool) if valid is None else np.asarray(valid, bool)
    return Rows(oracle.record_of(ids), (ids % K).astype(np.int32), ids, valid)


def stored_ids(state, devices: int) -> list[dict[int, int]]:
    """What each shard stores, as {slot: id}."""
    ids = np.asarray(state.id).reshape(max(devices, 1), -1)
    return [{slot: int(i) for slot, i in enumerate(row) if i >= 0} for row in ids]


def fill(insert, place, state, counts, devices, skip_class=None):
    """Gives shard s `counts[s]` fresh rows, in batches of which each device may use any part."""
    fresh = itertools.count()
    left = list(counts)
    step = 0
    while any(left):
        ids, valid = np.zeros((devices, PER_DEVICE), np.int64), np.zeros((devices, PER_DEVICE), bool)
        for s in range(devices):
            for j in range(min(PER_DEVICE, left[s])):
                ident = next(fresh)
                while skip_class is not None and ident % K == skip_class:
                    ident = next(fresh)
                ids[s, j], valid[s, j] = ident, True
            left[s] -= int(valid[s].sum())
        state = insert(state, place(rows_of(ids.reshape(-1), valid.reshape(-1))), jax.random.key(step))
        step += 1
    return state


def check_draw(drawn, stores, representatives):
    """Law 1 and 3: whole stored rows, distinct, as many as there are, from the shard they name; the rest marked and zero."""
    valid = np.asarray(drawn.valid)
    ids, origin = np.asarray(drawn.id), np.asarray(drawn.shard)
    assert valid.sum() == min(representatives, sum(len(s) for s in stores))
    picked = ids[valid]
    oracle.assert_whole(
        jax.tree.map(lambda x: np.asarray(x)[valid], drawn.record), np.asarray(drawn.label)[valid], picked, K
    )
    assert all(i in stores[s].values() for i, s in zip(picked, origin[valid], strict=True))
    assert (ids[~valid] == -1).all() and (origin[~valid] == -1).all()
    assert all(not np.asarray(x)[~valid].any() for x in jax.tree.leaves(drawn.record))
    return picked


@pytest.mark.parametrize("devices", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("policy", POLICIES)
def test_insert_is_the_loop_over_rows(policy, devices):
    """Law 1: after every insert each slot holds the record that a loop over the rows would have left there.

    21 rows for up to 24 candidates a step: slots collide in most batches.
    """
    capacity, shards = 21, max(devices, 1)
    _, insert, _, place = setup(devices, policy, capacity, 16)
    buffer = setup(devices, policy, capacity, 16)[0]
    shadow = [oracle.make(policy, s, capacity, shards, K) for s in range(shards)]
    state, rng = buffer.init(), np.random.default_rng(devices)
    for step in range(12):
        ids = step * 100 + rng.permutation(100)[: shards * PER_DEVICE]
        valid = rng.random(ids.shape) < 0.8
        key = jax.random.key(step)
        state = insert(state, place(rows_of(ids, valid)), key)
        for s, one in enumerate(shadow):
            mine = slice(s * PER_DEVICE, (s + 1) * PER_DEVICE)
            oracle.insert(one, ids[mine], ids[mine] % K, valid[mine], jax.random.fold_in(key, s), accept=0.4)
        assert stored_ids(state, devices) == [one.slots for one in shadow]
        written = np.asarray(state.id) >= 0
        oracle.assert_whole(
            jax.tree.map(lambda x, w=written: np.asarray(x)[w], state.record),
            np.asarray(state.label)[written],
            np.asarray(state.id)[written],
            K,
        )
    assert sum(len(one.slots) for one in shadow) == capacity  # law 4: the union's budget, whatever the number of shards


def test_colliding_rows_survive_whole():
    slot = jnp.array([3, 1, 3, 9, 1, 3, 8])
    kept = np.asarray(shard.keep_last(slot, slots=8))
    assert kept[4] == 1 and kept[5] == 3
    assert (np.delete(kept, [4, 5]) >= 8).all() and len(set(kept)) == 7


@pytest.mark.parametrize("devices", [0, 1, 4, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (2, 8))])
@pytest.mark.parametrize("policy", POLICIES)
def test_draws_at_every_fill(policy, devices):
    """Law 3: from the empty buffer to the full one, rows arriving one at a time at uneven shards."""
    shards, representatives = max(devices, 1), 8
    buffer, insert, sample, place = setup(devices, policy, 40, representatives)
    state, rng = buffer.init(), np.random.default_rng(0)
    check_draw(sample(state, jax.random.key(0)), stored_ids(state, devices), representatives)
    for step in range(60):
        valid = np.zeros(shards * PER_DEVICE, bool)
        valid[int(rng.integers(shards) ** 2 // shards) * PER_DEVICE] = True
        state = insert(state, place(rows_of(step * 50 + np.arange(valid.size), valid)), jax.random.key(step))
        check_draw(sample(state, jax.random.key(step)), stored_ids(state, devices), representatives)


COUNTS = {  # rows given to each of 4 shards: unequal, one empty, all in one, fewer than asked for, exactly at 4 R, equal
    "unequal": (10, 3, 7, 1),
    "one empty": (9, 0, 8, 10),
    "all in one": (0, 0, 10, 0),
    "too few": (1, 0, 2, 2),
    "equal": (10, 10, 10, 10),
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_rows_are_dealt_as_planned(counts):
    """The exchange delivers exactly the planned rows, each to the device the plan names."""
    devices, representatives = 4, 8
    buffer, insert, sample, place = setup(devices, "reservoir", 40, representatives)
    state = fill(insert, place, buffer.init(), counts, devices)
    stores = stored_ids(state, devices)
    union = [store[slot] for store in stores for slot in sorted(store)]
    for seed in range(20):
        key = jax.random.key(seed)
        drawn = sample(state, key)
        plan = jax.device_get(plan_of(key, jnp.array(counts, jnp.int32), representatives))
        ranks = [int(r) for r in plan.rank if r != draw.NONE]
        assert ranks == sorted(set(ranks)) and len(ranks) == min(representatives, sum(counts))
        hands = oracle.dealt(ranks, int(plan.offset), devices, representatives // devices)
        ids = np.asarray(drawn.id).reshape(devices, -1)
        assert [{i for i in row if i >= 0} for row in ids] == [{union[rank] for rank in hand} for hand in hands]
        check_draw(drawn, stores, representatives)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mix", "balance"])
def test_both_branches_deliver(kind):
    """8 rows a device on 8 devices: equal shards fit the compact route (balance: most), rows of one shard need the full one."""
    devices, representatives = 8, 64
    compact, full = EXCHANGES[kind](8, 8, "data")
    buffer, insert, sample, place = setup(devices, "reservoir", 800, representatives, exchange=kind)
    for counts in ([100] * 8, [0, 100, 0, 0, 0, 0, 0, 0], [90, 0, 0, 3, 0, 0, 0, 0], [3, 0, 9, 1, 0, 0, 5, 0]):
        state = fill(insert, place, buffer.init(), counts, devices)
        stores = stored_ids(state, devices)
        fitted = set()
        for seed in range(10):
            check_draw(sample(state, jax.random.key(seed)), stores, representatives)
            plan = plan_of(jax.random.key(seed), jnp.array(counts, jnp.int32), representatives)
            fitted.add(bool(compact.fits(plan)))
            assert bool(full.fits(plan))
        if counts[0] == 100:
            assert fitted == {True} if kind == "mix" else True in fitted
        if max(counts) == sum(counts):
            assert fitted == {False}


def chi_square(observed: np.ndarray) -> float:
    """p-value of equal cell probabilities, from independent picks."""
    assert observed.sum() / observed.size > 5
    return stats.chisquare(observed.reshape(-1)).pvalue


@functools.cache
def many_plans(sizes, count, draws=20_000):
    keys = jax.random.split(jax.random.key(7), draws)
    plan = jax.jit(jax.vmap(lambda key: draw.make_plan(key, jnp.array(sizes, jnp.int32), count)))(keys)
    return jax.tree.map(np.asarray, plan)


@pytest.mark.parametrize(
    ("sizes", "count"),
    [((10, 3, 7, 1), 4), ((9, 0, 8, 10), 8), ((0, 0, 32, 0), 8), ((5, 2, 9, 4), 16), ((33,), 8), ((1, 30, 1, 1), 8)],
    ids=str,
)
def test_every_row_and_every_pair_is_equally_likely(sizes, count):
    """Law 2 on singles, on pairs and on where a row goes, in both algorithms (below and above 4 R rows)."""
    plan = many_plans(sizes, count)
    total, shards, rng = sum(sizes), len(sizes), np.random.default_rng(1)
    draws = np.arange(len(plan.rank))
    # One pick a draw: the picks are independent, so the chi-square law is exact.
    first, second = (rng.permuted(np.tile(np.arange(count), (len(draws), 1)), axis=1)[:, :2]).T
    a, b = plan.rank[draws, first], plan.rank[draws, second]
    assert max(a.max(), b.max()) < total and (a != b).all()
    assert chi_square(np.bincount(a, minlength=total)) > ALPHA
    pair = np.minimum(a, b) * total + np.maximum(a, b)
    cells = [i * total + j for i in range(total) for j in range(i + 1, total)]
    assert chi_square(np.bincount(pair, minlength=total * total)[cells]) > ALPHA
    device = (first + plan.offset) % shards
    assert chi_square(np.bincount(a * shards + device, minlength=total * shards)) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "skip_class"), [("reservoir", None), ("class_random", 3)])
def test_uniform_through_the_real_exchange(policy, skip_class, mesh_of):
    """Law 2 end to end on 4 devices, shards unequal and one empty, with 3 of 4 classes seen: 8,000 draws."""
    buffer, insert, _, place = setup(4, policy, 64, 8)
    state = fill(insert, place, buffer.init(), (9, 0, 5, 12), 4, skip_class)
    stored = sorted(i for store in stored_ids(state, 4) for i in store.values())
    assert len(stored) < 32 or policy == "reservoir"

    @jax.jit
    def repeat(state, key):
        return jax.lax.map(lambda k: buffer.draw(state, k).id, jax.random.split(key, 2_000))

    ids = np.concatenate([np.asarray(repeat(state, jax.random.key(s))) for s in range(4)])
    rng = np.random.default_rng(2)
    pick = rng.permuted(np.tile(np.arange(8), (len(ids), 1)), axis=1)[:, :2]
    a, b = np.take_along_axis(ids, pick, axis=1).T
    position = {ident: n for n, ident in enumerate(stored)}
    a, b = (np.array([position[i] for i in x]) for x in (a, b))
    n = len(stored)
    assert chi_square(np.bincount(a, minlength=n)) > ALPHA
    pair = np.minimum(a, b) * n + np.maximum(a, b)
    cells = [i * n + j for i in range(n) for j in range(i + 1, n)]
    assert chi_square(np.bincount(pair, minlength=n * n)[cells]) > ALPHA


@pytest.mark.parametrize("shards", [1, 3])
def test_reservoir_keeps_every_row_of_its_stream_equally_often(shards):
    """4,000 independent reservoirs of 8 rows after 40 rows in uneven batches: each row is stored with probability 1/5."""
    capacity = 8 * shards
    rule = make_policy("reservoir", capacity=capacity, shards=shards)
    me = jnp.int32(shards - 1)

    def run(key):
        meta, slots = rule.init(me), jnp.full((rule.slots,), -1)
        valid = jnp.arange(7) < jnp.array([7, 2, 7, 0, 7, 7, 3, 7])[:, None]
        number = (jnp.cumsum(valid) - 1).reshape(valid.shape)

        def insert(carry, x):
            meta, slots = carry
            key, valid, ids = x
            slot, meta = rule.choose(meta, key, me, jnp.zeros(7, jnp.int32), valid)
            return (meta, slots.at[shard.keep_last(slot, rule.slots)].set(ids, mode="drop")), None

        (meta, slots), _ = jax.lax.scan(insert, (meta, slots), (jax.random.split(key, 8), valid, number))
        return slots

    slots = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 4_000)))
    assert slots.min() >= 0 and slots.max() == 39
    one = slots[np.arange(4_000), np.random.default_rng(0).integers(0, 8, 4_000)]
    assert chi_square(np.bincount(one, minlength=40)) > ALPHA


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
@pytest.mark.parametrize("capacity", [21, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 40))])
@pytest.mark.parametrize("policy", POLICIES)
def test_shares_add_up_to_the_budget(policy, capacity, shards):
    """Law 4: offered every class in plenty, the shards together store exactly `capacity` rows, in distinct slots."""
    rule = make_policy(policy, capacity=capacity, shards=shards, num_classes=5, accept=0.5)
    label = jnp.arange(200, dtype=jnp.int32) % 5
    total = 0
    for s in range(shards):
        me = jnp.int32(s)
        _, meta = rule.choose(rule.init(me), jax.random.key(0), me, label, jnp.ones(200, bool))
        size = int(rule.size(meta, me))
        located = np.asarray(rule.locate(meta, me, jnp.arange(size, dtype=jnp.int32)))
        assert sorted(located) == list(range(size)) and size <= rule.slots
        total += size
    assert total == capacity


def test_draws_under_vmap_are_the_draws_alone():
    """Also where the unions mapped over are emptier than a draw, so that no number of attempts could fill it."""
    keys, sizes = jax.random.split(jax.random.key(0), 5), jnp.array([[0, 0], [2, 1], [4, 4], [9, 40], [500, 300]])
    plan = jax.jit(functools.partial(draw.make_plan, count=8))
    together = jax.jit(jax.vmap(plan))(keys, sizes)
    for i in range(len(sizes)):
        jax.tree.map(
            np.testing.assert_array_equal, jax.tree.map(lambda x, i=i: x[i], together), plan(keys[i], sizes[i])
        )


def step_of(buffer):
    def step(state, rows, key):
        """One training step's use of the buffer: insert, then draw from the updated buffer."""
        insert_key, draw_key = jax.random.split(key)
        state = buffer.insert(state, rows, insert_key)
        return state, buffer.draw(state, draw_key)

    return step


@pytest.mark.parametrize("devices", [0, 8])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_compiled_step_is_in_place_and_flat(policy, devices):
    """Laws 5 and 6: nothing but the buffer itself grows with capacity: neither temporaries nor the work done.

    256 times the capacity; the whole state is aliased from input to output.
    """
    temporaries, flops = [], []
    for capacity in (64, 64 * 256):
        buffer, _, _, place = setup(devices, policy, capacity, 16)
        rows = place(rows_of(np.arange(max(devices, 1) * PER_DEVICE)))
        step = jax.jit(step_of(buffer), donate_argnums=0)
        compiled = step.lower(buffer.init(), rows, jax.random.key(0)).compile()
        memory = compiled.memory_analysis()
        temporaries.append(memory.temp_size_in_bytes)
        flops.append(compiled.cost_analysis()["flops"])
        assert memory.alias_size_in_bytes == buffer.num_bytes // max(devices, 1)
    assert temporaries[0] == temporaries[1]
    assert flops[0] == flops[1]


def test_a_draw_is_one_gather_of_sizes_and_one_exchange():
    """However many leaves a record has, a draw costs one all_gather and one all_to_all (one in each branch)."""
    buffer, _, sample, _ = setup(8, "reservoir", 800, 64)
    text = sample.lower(buffer.init(), jax.random.key(0)).compile().as_text()
    assert text.count(" all-gather(") == 1
    assert text.count(" all-to-all(") == 2


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("policy", POLICIES)
def test_replayable(policy, devices):
    """Law 7: state and seed determine everything; a copy of the state taken midway continues identically."""
    buffer, insert, sample, place = setup(devices, policy, 40, 8)

    def run(state, steps):
        for step in steps:
            ids = step * 100 + np.arange(devices * PER_DEVICE)
            state = insert(state, place(rows_of(ids)), jax.random.key(step))
        return state

    whole = run(buffer.init(), range(20))
    middle = jax.device_get(run(buffer.init(), range(10)))
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    resumed = run(mesh_lib.shard_rows(mesh, middle), range(10, 20))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    jax.tree.map(np.testing.assert_array_equal, sample(whole, jax.random.key(1)), sample(resumed, jax.random.key(1)))


def test_memory_is_rows_times_row_bytes():
    buffer, *_ = setup(8, "class_random", 64 * 256, 16)
    row = 6 + 12 + 1 + 4 + 4  # image, logits, flag, label, id
    assert buffer.num_bytes == 64 * 256 * row + 8 * (K + 2) * 4  # fill of K classes, rows that came, rows refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"capacity": 7}, ("buffer.capacity: 7 is", "at least 8")),
        ({"capacity": 9, "num_classes": 10}, ("buffer.capacity: 9 is", "10 classes")),
        ({"representatives": 12}, ("buffer.representatives: 12 is", "8")),
        ({"representatives": 0}, ("buffer.representatives: 0 is",)),
        ({"representatives": 48}, ("buffer.representatives: 48 is", "at most 40")),
        ({"representatives": 96, "memory": "replicated"}, ("buffer.representatives: 96 is", "at most 40")),
        ({"representatives": 328, "memory": "independent"}, ("buffer.representatives: 328 is", "at most 320")),
        ({"policy": "lru"}, ("buffer.policy: 'lru'", "class_random", "reservoir")),
        ({"num_classes": None}, ("buffer.num_classes: None", "class_random")),
        ({"accept": 0.0}, ("buffer.accept: 0.0", "(0, 1]")),
    ],
    ids=str,
)
def test_bad_sizes_are_named(change, words, mesh_of):
    arguments = {"capacity": 40, "representatives": 8, "policy": "class_random", "num_classes": K, "accept": 0.5}
    with pytest.raises(ValueError) as error:
        make_buffer(RECORD, mesh=mesh_of(8), **(arguments | change))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
