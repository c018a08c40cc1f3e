"""Every route carries exactly the planned rows, whatever the shards hold; the other memories and draws obey their laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcl.buffer import draw
from jaxcl.buffer import threefry as random
from jaxcl.buffer.exchange import base as exchange
from jaxcl.buffer.exchange.balance import balance_route
from jaxcl.buffer.exchange.mix import Hops, compact_hops, mix_route
from jaxcl.errors import UserError
from jaxcl.mesh import AXIS, ROWS, WHOLE, make_mesh, on_mesh
from tests.unit.test_buffer_laws import ALPHA, K, check_draw, chi_square, fill, rows_of, setup, stored_ids

FULL = Hops(8, 8, 6, 6)
ROUTES = {
    "one hop": (8, 6, mix_route(FULL, 6, AXIS)),
    "two hops, 4 x 2": (8, 6, mix_route(Hops(8, 4, 12, 6), 6, AXIS)),
    "two hops, 2 x 4": (8, 6, mix_route(Hops(8, 2, 24, 6), 6, AXIS)),
    "two hops, 16 devices": (16, 3, mix_route(Hops(16, 4, 12, 3), 3, AXIS)),
    "balance": (8, 6, balance_route(6, 6, 8, AXIS)),
    "balance, 16 devices": (16, 3, balance_route(3, 3, 16, AXIS)),
}


@functools.cache
def carrier(name):
    """One compiled draw over shards of given sizes: a row is its own rank in the union."""
    shards, per_device, route = ROUTES[name]

    def local(sizes, key):
        me = lax.axis_index(AXIS)
        plan = draw.make_plan(key, sizes, shards * per_device)

        def read(position):  # what another shard supplies cannot be read here
            mine = (position >= plan.first[me]) & (position < plan.first[me + 1])
            return {"rank": jnp.where(mine, plan.rank.at[position].get(mode="clip"), -7)}

        ((rows, source, valid),) = exchange.run((route,), (plan,), me, (read,))
        return rows["rank"], source, valid, plan.rank, route.fits(plan)[None]

    return on_mesh(make_mesh(jax.devices()[:shards]), local, (WHOLE, WHOLE), (ROWS, ROWS, ROWS, WHOLE, ROWS))


@pytest.mark.parametrize("name", ROUTES)
def test_a_route_carries_every_planned_row_once(name):
    """Equal, unequal, empty and single shards, and unions smaller than the draw; full-size routes fit them all."""
    shards, per_device, _ = ROUTES[name]
    rng = np.random.default_rng(0)
    cases = [np.full(shards, 50), np.eye(shards, dtype=int)[3] * 200, np.full(shards, 2), np.zeros(shards, int)]
    cases += [
        rng.integers(0, high, shards) * rng.integers(0, 2, shards) for high in (3, 10, 100, 1000) for _ in range(3)
    ]
    for seed, sizes in enumerate(cases):
        out = carrier(name)(jnp.asarray(sizes, jnp.int32), jax.random.key(seed))
        rank, source, valid, planned, fits = (np.asarray(x) for x in out)
        assert fits.all()
        wanted = planned[planned != draw.NONE]
        assert len(wanted) == min(shards * per_device, sizes.sum())
        assert sorted(rank[valid]) == wanted.tolist()
        begin = np.cumsum(sizes) - sizes
        assert (rank[valid] >= begin[source[valid]]).all() and (rank[valid] < (begin + sizes)[source[valid]]).all()
        assert not rank[~valid].any() and (source[~valid] == -1).all()
        if "balance" in name:  # nothing travels that need not: a shard keeps what it supplies, up to r
            device = np.repeat(np.arange(shards), per_device)
            supplied = np.bincount(source[valid], minlength=shards)
            stayed = np.bincount(source[valid & (source == device)], minlength=shards)
            assert stayed.tolist() == np.minimum(supplied, per_device).tolist()


@pytest.mark.parametrize("name", [n for n in ROUTES if "balance" not in n])
def test_mix_gives_every_device_a_uniform_sample(name):
    """One row of a device's hand, of 3,000 draws: every rank of the union is equally likely on every device."""
    shards, per_device, _ = ROUTES[name]
    sizes = jnp.asarray([8] * (shards - 2) + [0, 30], jnp.int32)
    draws = jax.jit(lambda keys: lax.map(lambda key: carrier(name)(sizes, key)[:3], keys))(
        jax.random.split(jax.random.key(1), 3_000)
    )
    rank, _, valid = (np.asarray(x).reshape(3_000, shards, per_device) for x in draws)
    rng = np.random.default_rng(0)
    total = int(sizes.sum())
    for device in (0, shards - 1):
        assert valid[:, device].all()
        hand = rank[np.arange(3_000), device, rng.integers(0, per_device, 3_000)]
        assert chi_square(np.bincount(hand, minlength=total)) > ALPHA


def test_two_hops_are_taken_where_devices_outnumber_rows():
    assert compact_hops(7, 8).along == 1
    for per_device in (7, 16, 56):
        two = compact_hops(per_device, 1024)
        assert two.across * two.along == 1024 and two.along > 1
        assert two.rows_moved <= 1024 / 2  # one hop would move at least a row to each of 1,024 devices


def tight_hops(per_device, shards, axis):
    """An exchange of two hops that many draws overflow, at either hop: no config chooses two hops on so few devices."""
    tight, full = Hops(shards, 4, 2, 2), Hops(shards, shards, per_device, per_device)
    return mix_route(tight, per_device, axis), mix_route(full, per_device, axis)


def test_two_hops_in_a_buffer_draw_what_one_hop_draws():
    """Whether a draw fits the compact hops, overflows the first alone, the second alone or both: the same rows everywhere."""
    shards, per_device = 8, 3
    assert compact_hops(per_device, shards).along == 1
    one_hop, insert, sample, place = setup(shards, "reservoir", 480, shards * per_device)
    two_hops, _, sample_two, _ = setup(shards, "reservoir", 480, shards * per_device, exchange=f"{__name__}:tight_hops")
    assert two_hops.traffic["rows_moved"] < one_hop.traffic["rows_moved"]
    found = set()
    fills = (
        (6,) * 8,
        (6, 6, 6, 6, 1, 1, 1, 1),
        (20, 1, 1, 1, 5, 5, 5, 5),
        (20, 5, 5, 5, 1, 1, 1, 1),
        (2,) * 8,
        (0,) * 8,
    )
    for counts in fills:
        state = fill(insert, place, one_hop.init(), counts, shards)
        for seed in range(12):
            key = jax.random.key(seed)
            expected, drawn = jax.device_get((sample(state, key), sample_two(state, key)))
            jax.tree.map(np.testing.assert_array_equal, drawn, expected)
            check_draw(drawn, stored_ids(state, shards), shards * per_device)
            supplied = np.bincount(expected.shard[expected.valid], minlength=shards)
            near, far = (-(-supplied // 4)).max() <= 2, (-(-supplied.reshape(2, 4).sum(1) // 8)).max() <= 2
            found.add((bool(near), bool(far)))
    assert found == {(True, True), (True, False), (False, True), (False, False)}


def sharing(state):
    """Ids held by each shard."""
    return [set(store.values()) for store in stored_ids(state, 4)]


def many_inserts(insert, place, state, steps=40):
    for step in range(steps):
        state = insert(state, place(rows_of(step * 12 + np.arange(12))), jax.random.key(step))
    return state


def test_a_replicated_memory_is_one_memory_everywhere():
    buffer, insert, sample, place = setup(4, "class_random", 20, 8, memory="replicated")
    state = many_inserts(insert, place, buffer.init())
    shards = np.asarray(state.id).reshape(4, -1)
    assert (shards == shards[0]).all() and (shards >= 0).all()
    found = buffer.stats(state)
    assert found["distinct_ids"] == 20 and found["rows"] == 80 and found["overlap"] == 1.0
    one, insert_one, _, place_one = setup(0, "class_random", 20, 8)
    alone = many_inserts(insert_one, place_one, one.init())
    np.testing.assert_array_equal(shards[0], np.asarray(alone.id))  # the very memory of one device with the whole batch
    for seed in range(10):
        drawn = sample(state, jax.random.key(seed))
        picked = check_draw(drawn, stored_ids(state, 4), 8)
        assert len(set(picked)) == 8  # one draw of the memory, shared out
    assert buffer.traffic["rows_moved"] == 0


def test_independent_memories_choose_alone_and_may_overlap():
    """DyTox's distributed memory: N capacities, each a uniform choice of its own among the rows of all devices."""
    buffer, insert, sample, place = setup(4, "reservoir", 20, 8, memory="independent")
    state = many_inserts(insert, place, buffer.init(), steps=5)  # 60 rows seen
    held = sharing(state)
    assert [len(ids) for ids in held] == [20] * 4 and len(set(map(frozenset, held))) == 4
    found = buffer.stats(state)
    pairs = [len(a & b) / 20 for i, a in enumerate(held) for j, b in enumerate(held) if i != j]
    assert found["rows"] == 80 and found["overlap"] == pytest.approx(np.mean(pairs))
    assert found["distinct_ids"] == len(set.union(*held)) < 80
    for seed in range(10):
        drawn = sample(state, jax.random.key(seed))
        np.testing.assert_array_equal(np.asarray(drawn.shard), np.repeat(np.arange(4), 2))
        for device, ids in enumerate(np.asarray(drawn.id).reshape(4, 2)):
            assert set(ids) <= held[device] and len(set(ids)) == 2


def test_the_local_exchange_draws_from_its_own_shard():
    buffer, insert, sample, place = setup(4, "reservoir", 40, 8, exchange="local")
    state = fill(insert, place, buffer.init(), (10, 1, 0, 5), 4)
    held = sharing(state)
    for seed in range(10):
        drawn = sample(state, jax.random.key(seed))
        valid = np.asarray(drawn.valid).reshape(4, 2)
        assert valid.sum(axis=1).tolist() == [2, 1, 0, 2]
        for device, ids in enumerate(np.asarray(drawn.id).reshape(4, 2)):
            assert set(ids[valid[device]]) <= held[device] and (ids[~valid[device]] == -1).all()


@pytest.mark.parametrize("devices", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_class_balanced_draws(devices):
    """8 rows of a union with 1, 2, 9 and no rows of the four classes: 1, 2 and 5 of them, whole, distinct, as stored."""
    shards = max(devices, 1)
    buffer, insert, sample, place = setup(devices, "class_random", 48, 8, sampling="class_balanced")
    ids = [0, 1, 5, *range(2, 38, 4)]
    state = buffer.init()
    for at in range(0, len(ids), shards):
        chunk = ids[at : at + shards]
        lanes, valid = np.zeros((shards, 3), int), np.zeros((shards, 3), bool)
        lanes[: len(chunk), 0], valid[: len(chunk), 0] = chunk, True
        state = insert(state, place(rows_of(lanes.reshape(-1), valid.reshape(-1))), jax.random.key(at))
    stores = stored_ids(state, devices)
    assert sum(len(store) for store in stores) == len(ids)
    counts = np.zeros(38, int)
    for seed in range(300):
        picked = check_draw(sample(state, jax.random.key(seed)), stores, 8)
        assert len(set(picked)) == 8
        assert np.bincount(picked % K, minlength=4).tolist() == [1, 2, 5, 0]
        counts[np.random.default_rng(seed).choice(picked[picked % K == 2])] += 1
    assert chi_square(counts[2::4]) > ALPHA


def dear(per_device, shards, axis):
    """An exchange from outside the package: the full route of `mix`, at another price."""
    route = mix_route(Hops(shards, shards, per_device, per_device), per_device, axis)
    return (route._replace(rows_moved=7 * route.rows_moved),)


def test_an_exchange_from_outside():
    name = f"{__name__}:dear"
    buffer, insert, sample, place = setup(4, "reservoir", 40, 8, exchange=name)
    state = fill(insert, place, buffer.init(), (10, 1, 0, 5), 4)
    check_draw(sample(state, jax.random.key(0)), stored_ids(state, 4), 8)
    assert buffer.traffic["rows_moved"] == 7 * 8
    with pytest.raises(UserError, match=r"buffer.exchange: 'nowhere:mix' cannot be imported"):
        setup(4, "reservoir", 40, 8, exchange="nowhere:mix")


fair = jax.jit(lambda key, sizes, count: draw.fair_shares(jax.random.bits(key, sizes.shape), sizes, count))


def test_fair_shares_are_as_even_as_sizes_allow():
    """Against dealing one row at a time to the classes that have some left; the spare rows go to random classes."""
    rng = np.random.default_rng(0)
    for trial in range(200):
        sizes = rng.integers(0, rng.integers(1, 30), 6)
        count = int(rng.integers(1, 40))
        share = np.asarray(fair(jax.random.key(trial), jnp.asarray(sizes, jnp.int32), count))
        left, dealt = count, np.zeros(6, int)
        while left >= (dealt < sizes).sum() > 0:
            left -= (dealt < sizes).sum()
            dealt += dealt < sizes
        assert share.sum() == min(count, sizes.sum())
        assert ((share == dealt) | ((share == dealt + 1) & (dealt < sizes))).all()
    extra = sum(np.asarray(fair(jax.random.key(t), jnp.full(6, 9, jnp.int32), 8)) - 1 for t in range(600))
    assert chi_square(extra) > ALPHA


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"memory": "global"}, ("buffer.memory", "global", "independent")),
        ({"exchange": "shuffle"}, ("buffer.exchange", "shuffle", "balance")),
        ({"sampling": "stratified"}, ("buffer.sampling", "stratified", "class_balanced")),
        ({"sampling": "class_balanced"}, ("buffer.sampling", "class_balanced", "reservoir")),
    ],
    ids=str,
)
def test_bad_names_are_answered(change, words):
    with pytest.raises(ValueError) as error:
        setup(4, "reservoir", 40, 8, **change)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_records_travel_in_their_own_types():
    """Every dtype a record may have survives the packed transfer bit for bit."""
    rng = np.random.default_rng(0)
    tree = {
        name: jnp.asarray(rng.integers(0, 2, (5, 3)) if name == "bool" else rng.normal(size=(5, 3)) * 50).astype(name)
        for name in ("bool", "uint8", "int8", "int16", "int32", "uint32", "float16", "bfloat16", "float32")
    }
    tree["scalar"] = jnp.arange(5)
    packed, unpack = exchange.pack(tree)
    assert packed.dtype == jnp.uint8 and packed.shape == (5, 3 * (3 + 2 + 4 + 4 + 2 + 2 + 4) + 4)
    back = unpack(packed)
    for name, leaf in tree.items():
        assert back[name].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(back[name]), np.asarray(leaf))


def test_integers_below_a_bound_are_exact():
    """Against Python's integers, at the ends of the words and of the spans; and uniform."""
    edge = np.array([0, 1, 2**16 - 1, 2**16, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
    rng = np.random.default_rng(0)
    high, low = (
        np.concatenate([rng.permutation(np.repeat(edge, 7)), rng.integers(0, 2**32, 500, np.uint32)]) for _ in "hl"
    )
    for span in (1, 2, 3, 10, 2**16 - 1, 2**16 + 1, 1_000_003, 2**31 - 1):
        found = np.asarray(random.below(jnp.stack([high, low]), jnp.full(high.shape, span, jnp.int32)))
        exact = [(int(h) * 2**32 + int(w)) * span >> 64 for h, w in zip(high, low, strict=True)]
        assert found.tolist() == exact
    values = random.below(random.words(jax.random.key(0), 60_000), 37)
    assert chi_square(np.bincount(np.asarray(values), minlength=37)) > ALPHA
