"""The host tier called as the device tier: the same rows in whatever order they are collected, for one state alone."""

import jax
import numpy as np
import pytest

from jaxcl.buffer import Rows, make_buffer
from jaxcl.errors import UserError

RECORD = {"x": jax.ShapeDtypeStruct((), np.uint16), "y": jax.ShapeDtypeStruct((3,), np.float32)}


def batch(step: int) -> Rows:
    ids = np.arange(16, dtype=np.int32) + 100 * step
    record = {"x": ids.astype(np.uint16), "y": (ids[:, None] + np.arange(3)).astype(np.float32)}
    return Rows(record, (ids % 4).astype(np.int32), ids)


@pytest.fixture
def made(mesh_of):
    def make(tier="host", **options):
        return make_buffer(RECORD, capacity=20, representatives=8, num_classes=4, mesh=mesh_of(4), tier=tier, **options)

    return make


def key(step: int) -> jax.Array:
    return jax.random.key(step)


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def course(buffer):
    """Four inserts of which three draw, collected in another order than asked for; then a draw."""
    state, asked = buffer.insert(buffer.init(), batch(0), key(0)), {}
    for step in (1, 2, 3):
        state, asked[step] = buffer.ask(state, batch(step), key(step))
    drawn = {step: buffer.collect(asked[step]) for step in (3, 1, 2)}
    return jax.device_get((drawn, buffer.draw(state, key(9)), state.id)), state


@pytest.mark.parametrize(
    "options",
    [
        {"queue": 1},
        pytest.param({"policy": "class_balanced", "sampling": "class_balanced"}, marks=pytest.mark.slow),
        pytest.param({"exchange": "balance"}, marks=pytest.mark.slow),
        pytest.param({"memory": "replicated"}, marks=pytest.mark.slow),
    ],
)
def test_what_was_asked_for_comes_whenever_it_is_collected(options, made):
    """Each draw is of the memory as it stood when it was asked for, though later rows have taken slots of it since."""
    buffer = made(**options)
    found, wanted = course(buffer)[0], course(made("device", **options))[0]
    assert found[0][1].valid.all() and set(found[0][1].id) - set(found[2])  # some were overwritten
    assert_same(found, wanted)
    assert_same(jax.device_get(buffer.collect(buffer.no_rows())), jax.device_get(made("device", **options).no_rows()))


def test_a_memory_serves_one_state(made):
    buffer = made()
    first = buffer.init()
    state = buffer.insert(first, batch(0), key(0))
    message = "a memory of the host tier serves the state that its last call returned"
    with pytest.raises(UserError, match=f"{message}: this one was given away"):
        buffer.insert(first, batch(1), key(1))
    with pytest.raises(UserError, match=f"{message}: 4 rows came to each device by it and 0 by this"):
        buffer.draw(buffer.init(), key(1))
    passed = jax.jit(lambda state: state)(state)  # as a state that goes through a user's own step
    drawn = buffer.draw(passed, key(2))
    copy = jax.tree.map(lambda x: jax.device_put(np.asarray(x), x.sharding), passed)
    assert_same(jax.device_get(buffer.draw(copy, key(2))), jax.device_get(drawn))
    state = buffer.insert(copy, batch(1), key(1))
    with pytest.raises(UserError, match=f"{message}: 8 rows .* and 4 by this"):
        buffer.draw(passed, key(1))
    with pytest.raises(UserError, match="rows of `stage` come within `serving` alone"):
        buffer.collect(jax.jit(buffer.stage)(state, [key(1)])[0])
    with pytest.raises(UserError, match="asked of another buffer"):
        other = made()
        buffer.collect(other.ask(other.init(), batch(0), key(0))[1])


def test_a_memory_goes_on_from_saved_rows(made):
    whole = made()
    _, state = course(whole)
    saved = jax.device_get(state), {shard: rows.copy() for shard, rows in whole.host.payload().items()}
    wanted = whole.insert_and_draw(state, batch(4), key(4))[1]
    later = made()
    with pytest.raises(UserError, match="0 rows came to each device by it and 16 by this"):
        later.draw(saved[0], key(4))
    later.host.restore(saved[1])
    assert_same(
        jax.device_get(later.insert_and_draw(saved[0], batch(4), key(4))[1]),
        jax.device_get(wanted),
    )


def test_rows_asked_for_are_in_the_memory_that_is_saved(made):
    buffer = made()
    state, _ = buffer.ask(buffer.init(), batch(0), key(0))
    payload = np.concatenate([rows["x"] for rows in buffer.host.payload().values()])
    ids = np.asarray(state.id)
    np.testing.assert_array_equal(payload[ids >= 0], ids[ids >= 0])
    assert (ids >= 0).sum() == 16


def test_neither_traced_nor_moved_in_two_ways(made):
    buffer = made()
    state = buffer.init()
    for call in (buffer.insert, buffer.insert_and_draw, buffer.ask):
        with pytest.raises(UserError, match=r"buffer.tier: 'host' .* device under jit"):
            jax.jit(call)(state, batch(0), key(0))
    with pytest.raises(UserError, match=r"buffer.tier: 'host' .* device under jit"):
        jax.eval_shape(buffer.draw, state, key(0))
    state = buffer.insert(state, batch(0), key(0))
    with pytest.raises(UserError, match="moved by insert, draw, ask and collect, not by its writer"):  # noqa: SIM117
        with buffer.host.serving(0):
            pass
    buffer = made()
    with buffer.host.serving(0), pytest.raises(UserError, match=r"moved by its writer, .* not by insert, draw"):
        buffer.draw(buffer.init(), key(0))


@pytest.mark.parametrize("tier", ["device", "host"])
def test_rows_are_checked_before_their_types_are_narrowed(tier, made):
    buffer, rows = made(tier), batch(0)
    wide = Rows({**rows.record, "y": rows.record["y"].astype(np.float64)}, rows.label)
    for call in (buffer.insert, buffer.insert_and_draw, buffer.ask):
        with pytest.raises(UserError, match=r"rows.record.y: float64 \[16, 3\] is not allowed, give float32"):
            call(buffer.init(), wide, key(0))
