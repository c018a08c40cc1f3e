"""Laws 5 and 6 for every dtype, policy, memory and form of call; batches of any size; programs with 64-bit types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import POLICIES, Rows, make_buffer, shard, sort
from jaxcl.buffer.buffer import MEMORIES
from jaxcl.buffer.policy import make_policy
from tests import oracle

K, BATCH, DRAWN, SEEDS = 4, 16, 8, 3
DTYPES = (
    "uint8", "int8", "int16", "int32", "bool", "float32", "bfloat16", "float16", "float8_e4m3fn", "int4", "complex64",
)  # fmt: skip
RECORD = {name: jax.ShapeDtypeStruct((3,), jnp.dtype(name)) for name in DTYPES}
RECORD["key"] = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
CAPACITY = 65536


def spec(*shape, dtype="int32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def make(policy, record=RECORD, **options):
    return make_buffer(
        record, representatives=DRAWN, policy=policy, num_classes=K, accept=0.4, **({"capacity": CAPACITY} | options)
    )  # fmt: skip


def step_of(buffer, draws):
    def step(state, rows, key):
        state = buffer.insert(state, rows, key)
        return state, buffer.draw(state, key) if draws else None

    return step


def scanned(step):
    return lambda state, rows, key: jax.lax.scan(lambda s, k: step(s, rows, k), state, jax.random.split(key, 3))


FORMS = {"plain": lambda step: step, "scan": scanned, "vmap": jax.vmap}
SLOW, MORE = pytest.mark.slow, pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("devices", "memory", "draws", "counts"),
    [(0, "sharded", False, False), (0, "sharded", False, True), pytest.param(0, "sharded", True, False, marks=SLOW)]
    + [
        pytest.param(4, m, d, d, marks=SLOW if (m, d) == ("sharded", True) else MORE)
        for m in MEMORIES
        for d in (False, True)
    ],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", POLICIES)
def test_no_leaf_of_any_type_is_copied(policy, form, devices, memory, draws, counts, mesh_of):
    """Law 5. A copy of any leaf or list of slots has a byte or more for each slot; all temporaries together have fewer."""
    mesh = mesh_of(devices) if devices else None
    buffer = make(policy, mesh=mesh, memory=memory, count_classes=counts)
    rows = Rows(
        jax.tree.map(lambda s: jax.ShapeDtypeStruct((BATCH, *s.shape), s.dtype), RECORD), spec(BATCH), spec(BATCH)
    )
    arguments = jax.eval_shape(buffer.init), rows, jax.eval_shape(lambda: jax.random.key(0))
    options = {}
    if form == "vmap":
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct((SEEDS, *x.shape), x.dtype), arguments)
    if mesh:
        names = ([None] if form == "vmap" else []) + [mesh_lib.AXIS]
        own, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*n)) for n in (names, []))
        options["in_shardings"] = (own, own, whole)
    function = jax.jit(FORMS[form](step_of(buffer, draws)), donate_argnums=0, **options)
    found = function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert found < CAPACITY // (devices if devices and memory == "sharded" else 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_of_any_size_takes_memory_in_proportion(policy):
    """65,536 rows: about 60 bytes each. A table of rows by rows would have 4 GiB."""
    rule, n = make_policy(policy, capacity=CAPACITY, shards=1, num_classes=100, accept=0.4), 65536

    def slots(meta, key, label, valid):
        slot, meta = rule.choose(meta, key, jnp.int32(0), label, valid)
        return shard.keep_last(slot, rule.slots), meta

    meta, key = jax.eval_shape(rule.init, jnp.int32(0)), jax.eval_shape(lambda: jax.random.key(0))
    compiled = jax.jit(slots, donate_argnums=0).lower(meta, key, spec(n), spec(n, dtype="bool")).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100 * n


@pytest.mark.parametrize("policy", POLICIES)
def test_large_batches_are_the_loop_over_rows(policy):
    """300 rows at a time into 50 slots: most rows of an insert meet the traces of earlier ones."""
    rule, n = make_policy(policy, capacity=100, shards=2, num_classes=K, accept=0.4), 300
    one, choose, rng = oracle.make(policy, 1, 100, 2, K), jax.jit(rule.choose), np.random.default_rng(0)
    meta, stored = rule.init(jnp.int32(1)), {}
    for step, classes in enumerate((1, 2, 2, 4, 4)):
        ids, label = step * n + np.arange(n), rng.integers(0, classes, n).astype(np.int32)
        valid, key = rng.random(n) < (0.05 if step == 0 else 0.8), jax.random.key(step)
        slots, meta = choose(meta, key, jnp.int32(1), label, valid)
        stored |= {int(s): int(i) for s, i in zip(slots, ids, strict=True) if s < rule.slots}
        oracle.insert(one, ids, label, valid, key, 0.4)
        assert stored == one.slots


@pytest.mark.parametrize("policy", ["class_balanced", "herding"])
def test_seeds_together_are_each_alone(policy):
    """Loops of several seeds stop together, whatever each needs: one shard is empty, one full, one gets a new class."""
    rule, n, me = make_policy(policy, capacity=30, shards=1, num_classes=K), 20, jnp.int32(0)
    alone, rng = jax.jit(rule.choose), np.random.default_rng(0)
    label = jnp.asarray(np.stack([rng.integers(0, k, n) for k in (4, 2, 3)]), jnp.int32)
    valid = jnp.asarray(rng.random((SEEDS, n)) < [[0.3], [1.0], [0.9]])
    metas = [rule.init(me)] * SEEDS
    for seed in (1, 2):
        for step in range(4):
            metas[seed] = alone(metas[seed], jax.random.key(step), me, label[1], jnp.ones(n, bool))[1]
    keys = jax.random.split(jax.random.key(9), SEEDS)
    choose = jax.jit(jax.vmap(rule.choose, in_axes=(0, 0, None, 0, 0)))
    together = choose(jax.tree.map(lambda *x: jnp.stack(x), *metas), keys, me, label, valid)
    for s in range(SEEDS):
        expected = alone(metas[s], keys[s], me, label[s], valid[s])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, s=s: x[s], together), expected)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.filterwarnings("error")
def test_64_bit_types_change_no_slot(policy):
    rule, me, rng = (
        make_policy(policy, capacity=9, shards=1, num_classes=K, accept=0.4),
        jnp.int32(0),
        np.random.default_rng(0),
    )
    label, valid = jnp.asarray(rng.integers(0, K, 24), jnp.int32), jnp.asarray(rng.random(24) < 0.9)

    def twice():
        _, meta = jax.jit(rule.choose)(rule.init(me), jax.random.key(0), me, label[::-1], valid)
        slot, meta = jax.jit(rule.choose)(meta, jax.random.key(1), me, label, valid)
        assert {x.dtype for x in jax.tree.leaves((slot, meta, rule.size(meta, me)))} == {jnp.dtype("int32")}
        return slot, meta

    narrow = twice()
    with jax.enable_x64(True):
        jax.tree.map(np.testing.assert_array_equal, twice(), narrow)


@pytest.mark.parametrize("bound", [1, 7, 2**20, 2**31 - 1])
@pytest.mark.parametrize("n", [1, 2, 5000])
def test_order_is_that_of_a_stable_sort(n, bound):
    """From one round to three; keys from both ends of their range."""
    rng = np.random.default_rng(n)
    key = np.where(
        rng.random(n) < 0.5, rng.integers(0, min(bound, 50), n), bound - 1 - rng.integers(0, min(bound, 50), n)
    )
    key = jnp.asarray(key, jnp.int32)
    np.testing.assert_array_equal(sort.stable_order(key, bound), np.argsort(key, kind="stable"))
    last = {int(k): i for i, k in enumerate(key)}
    assert np.flatnonzero(sort.last_of_each(key, bound)).tolist() == sorted(last.values())
    first = np.unique(key, return_index=True)[1]
    assert np.flatnonzero(sort.first_of_each(key, bound)).tolist() == sorted(first)


def test_every_bit_of_every_type_comes_back():
    """Random bits: NaNs with payloads, quiet and signalling, subnormals, negative zeros."""
    n, rng = 64, np.random.default_rng(0)

    def random_of(s):
        if s.dtype == RECORD["key"].dtype:
            return jax.random.split(jax.random.key(1), n)
        if s.dtype == bool:
            return rng.random((n, *s.shape)) < 0.5
        if s.dtype == jnp.int4:
            return rng.integers(-8, 8, (n, *s.shape)).astype(s.dtype)
        return rng.integers(0, 256, (n, *s.shape, s.dtype.itemsize)).astype(np.uint8).view(s.dtype)[..., 0]

    record, ids = jax.tree.map(random_of, RECORD), np.arange(n, dtype=np.int32)
    buffer = make("fifo", capacity=n)
    state = jax.jit(buffer.insert)(buffer.init(), Rows(record, None, ids), jax.random.key(0))
    drawn = jax.jit(buffer.draw)(state, jax.random.key(1))
    for name, given in record.items():
        given, found = (
            jax.random.key_data(x) if name == "key" else x for x in (given[np.asarray(drawn.id)], drawn.record[name])
        )
        assert found.dtype == given.dtype
        assert np.asarray(found).tobytes() == np.asarray(given).tobytes(), name
