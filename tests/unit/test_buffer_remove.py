"""Rows that are found by a question, and rows that are removed: gone to the last byte, and no law of the others is touched."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows, forget, held, make_buffer, weights
from jaxcl.errors import UserError
from jaxcl.runs.checkpoint import Checkpoints, name_of
from tests import oracle

K, CAPACITY, BATCH = 4, 22, 16
RECORD = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), oracle.record_of(np.arange(1)))
KINDS = [
    {"policy": "reservoir", "repeats": "distinct", "num_ids": 200},
    {"policy": "class_random"},
    {"policy": "class_balanced", "sampling": "class_balanced", "exchange": "balance"},
    {"policy": "fifo", "memory": "replicated"},
    {"policy": "herding", "memory": "independent"},
]


@functools.cache
def mesh_of(shards):
    return mesh_lib.make_mesh(jax.devices()[:shards])


def rows_of(ids) -> Rows:
    ids = np.asarray(ids, np.int32)
    return Rows(oracle.record_of(ids), (ids % K).astype(np.int32), ids)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


def copy(state):
    return jax.tree.map(jnp.copy, state)


@pytest.mark.parametrize("options", KINDS, ids=lambda x: "-".join(map(str, x.values())))
def test_all_goes_on_as_if_the_rows_were_there_but_nobody_could_see_them(options):
    """Whatever the policy and memory, removing commutes with inserting other rows, and a draw with the same key is the draw of
    before with those rows masked: so every law of the rows that stay is the one that was tested without any removal."""
    buffer = make_buffer(
        RECORD, capacity=CAPACITY, representatives=20, num_classes=K, accept=0.5, mesh=mesh_of(4), **options
    )
    insert, draw = jax.jit(buffer.insert), jax.jit(buffer.draw)
    state = insert(buffer.init(), rows_of(np.arange(BATCH)), jax.random.key(0))
    state = insert(state, rows_of(np.arange(BATCH, 2 * BATCH)), jax.random.key(1))
    gone = np.array([3, 17, 18, 21, 30, 2**40, -1, -5])
    before, place = (
        jax.device_get(state),
        np.flatnonzero(np.isin(np.asarray(state.id), gone) & (np.asarray(state.id) >= 0)),
    )
    assert len(place) >= 2  # or nothing is tested
    removed = buffer.remove(copy(state), gone)
    np.testing.assert_array_equal(np.delete(removed.id, place), np.delete(before.id, place))
    assert (np.asarray(removed.id)[place] == -1).all()
    assert not np.isin(gone[:5], removed.id).any()
    for x, y in zip(jax.tree.leaves(removed.record), jax.tree.leaves(before.record), strict=True):
        assert not np.asarray(x)[place].any()
        np.testing.assert_array_equal(np.delete(x, place, axis=0), np.delete(y, place, axis=0))
    if removed.slot_of is not None:  # where they lay is forgotten too
        assert before.slot_of.reshape(4, -1)[:, gone[:5]].any()
        assert not np.asarray(removed.slot_of).reshape(4, -1)[:, gone[:5]].any()
    left = int((np.asarray(removed.id) >= 0).sum())
    assert buffer.stats(removed)["rows"] == left
    assert buffer.size(removed) == left // (4 if options.get("memory") == "replicated" else 1)

    key = jax.random.key(2)
    expected, found = jax.device_get(draw(state, key)), jax.device_get(draw(removed, key))
    hit = np.isin(expected.id, gone) & expected.valid
    assert hit.any()
    stays = lambda x, empty=0: np.where(hit.reshape(-1, *[1] * (x.ndim - 1)), np.array(empty, x.dtype), x)  # noqa: E731
    masked = jax.tree.map(stays, expected)
    masked = dataclasses.replace(masked, id=stays(expected.id, -1), shard=stays(expected.shard, -1))
    assert_same(found, masked)
    assert_same(forget(copy(draw(state, key)), gone), masked)  # a draw of before, that waits

    new = rows_of(np.arange(40, 40 + BATCH))
    after = buffer.remove(insert(state, new, jax.random.key(3)), gone)
    assert_same(insert(removed, new, jax.random.key(3)), after)
    again = insert(removed, rows_of(np.full(BATCH, 3)), jax.random.key(4))  # who comes again is stored again
    assert options["policy"] == "herding" or (np.asarray(again.id) == 3).any()


class Secret:
    """Rows of random bytes, to be searched for."""

    def __init__(self, n, width=64):
        self.ids = np.arange(n, dtype=np.int32)
        self.image = np.random.default_rng(7).integers(0, 256, (n, width), np.uint8)

    def rows(self) -> Rows:
        return Rows({"image": self.image.copy()}, id=self.ids.copy())

    def found_in(self, *contents: bytes) -> list[int]:
        return [int(i) for i in self.ids if any(self.image[i].tobytes() in content for content in contents)]


def on_devices() -> list[bytes]:
    """All that JAX holds, whoever refers to it."""
    gc.collect()
    return [np.asarray(x).tobytes() for x in jax.live_arrays() if x.dtype == np.uint8]


def in_files(path) -> list[bytes]:
    return [f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()]


def test_no_byte_of_a_removed_row_is_left(tmp_path):
    """In device memory, in draws that wait, in the next saved folder and the next checkpoint; those of the others are."""
    secret, gone = Secret(16), np.array([0, 5, 6])
    others = [int(i) for i in secret.ids if i not in gone]
    one = {"image": jax.ShapeDtypeStruct((64,), np.uint8)}
    buffer = make_buffer(one, capacity=16, representatives=16, mesh=mesh_of(4))
    state = jax.jit(buffer.insert)(buffer.init(), secret.rows(), jax.random.key(0))
    staged = jax.jit(buffer.stage)(state, [jax.random.key(1)])
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    checkpoints.save(name_of(0, False, 1), {"buffer": state, "staged": staged}, {})
    checkpoints.wait()
    buffer.save(state, tmp_path / "saved")
    places = {"devices": on_devices, **{x: functools.partial(in_files, tmp_path / x) for x in ("run", "saved")}}
    for name, there in places.items():  # or the search would prove nothing
        assert secret.found_in(*there()) == list(secret.ids), name
    state, staged = buffer.remove(state, gone), forget(staged, gone)
    assert secret.found_in(*on_devices()) == others
    checkpoints.save(name_of(0, False, 2), {"buffer": state, "staged": staged}, {})
    checkpoints.wait()
    checkpoints.close()
    buffer.save(state, tmp_path / "saved", overwrite=True)
    for name, there in places.items():
        assert secret.found_in(*there()) == others, name
    np.testing.assert_array_equal(buffer.load(tmp_path / "saved").id, state.id)  # empty places stay such
    alone = make_buffer(one, capacity=16, representatives=16)
    assert sorted(np.asarray(alone.load(tmp_path / "saved").id)) == [-1] * 3 + others


@pytest.mark.parametrize("path", [False, True])
def test_no_byte_is_left_in_host_memory_or_its_files(path, tmp_path):
    secret, gone = Secret(16), np.array([0, 5, 6])
    others = [int(i) for i in secret.ids if i not in gone]
    one = {"image": jax.ShapeDtypeStruct((64,), np.uint8)}
    device = make_buffer(one, capacity=16, representatives=16, mesh=mesh_of(4))
    device.save(jax.jit(device.insert)(device.init(), secret.rows(), jax.random.key(0)), tmp_path / "saved")
    rows = {"path": str(tmp_path / "rows")} if path else {}
    host = make_buffer(one, capacity=16, representatives=16, mesh=mesh_of(4), tier="host", **rows)
    state = host.load(tmp_path / "saved")
    staged = jax.jit(host.stage)(state, [jax.random.key(1)])
    with host.host.serving(0, staged) as store:  # gathers the rows of the draw
        with pytest.raises(UserError, match="between two runs of its writer"):
            host.remove(copy(state), gone)
        store.take()
    assert secret.found_in(*on_devices()) == list(secret.ids)
    state, staged = host.remove(state, gone), forget(staged, gone)
    assert secret.found_in(*on_devices()) == []  # the draw is gathered anew
    assert secret.found_in(*(x.tobytes() for x in host.host.payload().values())) == others
    if path:
        assert secret.found_in(*in_files(tmp_path / "rows")) == others
    host.save(state, tmp_path / "saved", overwrite=True)
    assert secret.found_in(*in_files(tmp_path / "saved")) == others
    receive = mesh_lib.on_mesh(mesh_of(4), host.local.receive, (mesh_lib.ROWS, mesh_lib.ROWS), mesh_lib.ROWS)
    with host.host.serving(0, staged) as store:
        (drawn,) = jax.device_get(receive(staged, store.take()))
    assert sorted(drawn.id) == [-1] * 3 + others and drawn.valid.sum() == len(others)
    assert not drawn.record["image"][~drawn.valid].any()


def test_on_other_devices_a_removed_row_stays_away_and_the_others_are_still_known(tmp_path):
    """`slot_of` of "distinct" tells of every stored id where it lies, the last one included."""
    options = {"capacity": CAPACITY, "representatives": 4, "repeats": "distinct", "num_ids": 32}
    four, two = (make_buffer(RECORD, mesh=mesh_of(n), **options) for n in (4, 2))
    state = jax.jit(four.insert)(four.init(), rows_of(np.arange(31, 15, -1)), jax.random.key(0))
    gone = np.arange(16, 31, 2)
    four.save(four.remove(state, gone), tmp_path / "saved")
    found = two.load(tmp_path / "saved")
    assert sorted(i for i in np.asarray(found.id) if i >= 0) == list(range(17, 32, 2))
    for ids, slot_of in zip(np.asarray(found.id).reshape(2, -1), np.asarray(found.slot_of).reshape(2, -1), strict=True):
        held = ids[ids >= 0]
        assert len(held) and (ids[:8] < 0).any()  # empty places are among the moved ones
        np.testing.assert_array_equal(ids[slot_of[held]], held)


def test_it_takes_no_memory_but_for_a_mask():
    sizes = {}
    for capacity in (1000, 4000):
        one = {"image": jax.ShapeDtypeStruct((256,), np.uint8), "half": jax.ShapeDtypeStruct((64,), jnp.bfloat16)}
        buffer = make_buffer(one, capacity=capacity, representatives=4)
        erase = buffer.remove.args[1]
        compiled = erase.lower(jax.eval_shape(buffer.init), jax.ShapeDtypeStruct((16,), np.int32)).compile()
        sizes[capacity] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes[4000] - sizes[1000] <= 3000 * 16  # bytes a row; the rows themselves are 384


@pytest.mark.parametrize("ids", [np.array([1.0]), np.array([[1]]), "all", [True]])
def test_ids_that_are_none_are_refused(ids):
    buffer = make_buffer(RECORD, capacity=4, representatives=2)
    with pytest.raises(UserError, match=r"^ids: .* is not allowed, give integers \[n\]$"):
        buffer.remove(buffer.init(), ids)


# Select.


@pytest.mark.parametrize("options", KINDS[2:], ids=lambda x: "-".join(map(str, x.values())))
@pytest.mark.parametrize("chunk", [1, 2**24])
def test_select_finds_the_rows_for_which_the_answer_is_yes(options, chunk, monkeypatch):
    monkeypatch.setattr(held, "CHUNK", 100 * chunk)
    buffer = make_buffer(
        RECORD, capacity=CAPACITY, representatives=20, num_classes=K, accept=0.5, mesh=mesh_of(4), **options
    )
    state = jax.jit(buffer.insert)(buffer.init(), rows_of(np.arange(BATCH)), jax.random.key(0))
    asked = []

    def predicate(record, label, ident):
        oracle.assert_whole(record, label, ident, K)
        asked.extend(ident)
        return record["flag"] & (label < 2)

    found = buffer.select(state, predicate)
    stored = np.asarray(state.id)
    if options.get("memory") == "replicated":  # one of the copies
        stored = stored[: len(stored) // 4]
    stored = stored[stored >= 0]
    assert asked == stored.tolist()
    np.testing.assert_array_equal(found.id, [i for i in stored if i % 3 == 0 and i % K < 2])
    oracle.assert_whole(found.record, found.label, found.id, K)
    assert found.valid.all() and len(found.id)
    none = buffer.select(state, lambda record, label, ident: ident < 0)
    assert none.id.shape == (0,) and none.record["image"].shape == (0, *oracle.ROW_SHAPE)


def test_what_is_selected_can_be_inserted_and_removed():
    record = {
        "brain": jnp.arange(12, dtype=jnp.bfloat16).reshape(6, 2),
        "wave": jnp.arange(6) + 1j * jnp.ones(6, jnp.complex64),
        "key": jax.random.split(jax.random.key(1), 6),
    }
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), record)
    buffer, ids = make_buffer(one, capacity=8, representatives=2), jnp.arange(6, dtype=jnp.int32)
    state = jax.jit(buffer.insert)(buffer.init(), Rows(record, id=ids), jax.random.key(0))
    found = buffer.select(state, lambda record, label, ident: record["wave"].real >= 2)
    np.testing.assert_array_equal(found.record["brain"], record["brain"][2:])
    assert (found.record["key"] == record["key"][2:]).all()
    state = buffer.remove(state, found.id)
    assert buffer.size(state) == 2
    fresh = jax.jit(buffer.insert)(buffer.init(), found, jax.random.key(0))
    assert sorted(np.asarray(fresh.id)) == [-1, -1, -1, -1, 2, 3, 4, 5]


@pytest.mark.parametrize("answer", [lambda n: np.ones(n), lambda n: np.ones(n + 1, bool), lambda n: True])
def test_another_answer_is_refused(answer):
    buffer = make_buffer(RECORD, capacity=8, representatives=2)
    state = jax.jit(buffer.insert)(buffer.init(), rows_of(np.arange(5)), jax.random.key(0))
    with pytest.raises(UserError, match=r"predicate: .* is not allowed as its answer, give bool \[5\]"):
        buffer.select(state, lambda record, label, ident: answer(len(ident)))


@pytest.mark.parametrize("memory", ["sharded", "replicated"])
def test_weights_are_removed_and_saved_with_their_rows(memory, tmp_path):
    """On as many devices as before and on others each row has its weight, and the sums above are those of the rows."""

    def buffer_on(shards):
        sizes = {"capacity": CAPACITY, "representatives": 16, "memory": memory, "sampling": "weighted"}
        return make_buffer(RECORD, mesh=mesh_of(shards), **sizes)

    def weights_of(state, shards):
        leaves, ids = np.asarray(state.weights.levels[0]), np.asarray(state.id)
        whole = weights.build(leaves.reshape(shards, -1), np.asarray(state.weights.greatest))
        assert_same(state.weights, whole)
        assert not leaves[ids < 0].any()
        return {int(i): float(w) for i, w in zip(ids[ids >= 0], leaves[ids >= 0], strict=True)}

    buffer = buffer_on(4)
    state = buffer.init()
    for i in range(2):
        ids = np.arange(i * BATCH, (i + 1) * BATCH, dtype=np.int32)
        given = dataclasses.replace(rows_of(ids), weight=ids.astype(np.float32) + 1)
        state = buffer.insert(state, given, jax.random.key(i))
    before = weights_of(state, 4)
    gone = sorted(before)[::3]
    state = buffer.remove(state, np.array(gone))
    left = {i: w for i, w in before.items() if i not in gone}
    assert weights_of(state, 4) == left == {i: i + 1.0 for i in left}
    found = buffer.select(state, lambda record, label, ident: ident % 2 == 0)
    assert dict(zip(found.id.tolist(), found.weight.tolist(), strict=True)) == {
        i: w for i, w in left.items() if i % 2 == 0
    }
    drawn = buffer.draw(state, jax.random.key(5))
    assert not set(np.asarray(drawn.id).tolist()) & set(gone) and int(drawn.valid.sum()) == min(16, len(left))
    buffer.save(state, tmp_path / "saved")
    assert_same(buffer.load(tmp_path / "saved"), state)
    for shards in (1, 8):
        assert weights_of(buffer_on(shards).load(tmp_path / "saved"), shards) == left


def test_draws_of_windows_and_those_that_wait_on_the_host():
    """Nobody knows whose rows are in a window: it is forgotten as a whole. What is still asked for has to come first."""
    record = {"time": jax.ShapeDtypeStruct((), np.int32)}
    buffer = make_buffer(record, capacity=8, representatives=2, policy="fifo", window=2, time="time")
    state = buffer.insert(buffer.init(), Rows({"time": np.arange(8, dtype=np.int32)}), jax.random.key(0))
    drawn = forget(buffer.draw(state, jax.random.key(1)), [3])
    assert not any(np.asarray(x).any() for x in (drawn.record["time"], drawn.length, drawn.valid))
    # A window ends before an empty place, whose time is 0.
    state = buffer.remove(state, [3, 0])
    draws = [jax.device_get(buffer.draw(state, jax.random.key(i))) for i in range(20)]
    found = {(int(i), int(n)) for d in draws for i, n in zip(d.id[d.valid], d.length[d.valid], strict=True)}
    assert found == {(1, 2), (2, 1), (4, 2), (5, 2), (6, 2), (7, 1)}
    buffer = make_buffer(record, capacity=8, representatives=2, mesh=mesh_of(2), tier="host")
    _, asked = buffer.ask(buffer.init(), Rows({"time": np.arange(8, dtype=np.int32)}), jax.random.key(0))
    with pytest.raises(UserError, match="staged: a draw that is still asked for is not allowed"):
        forget(asked, [3])
