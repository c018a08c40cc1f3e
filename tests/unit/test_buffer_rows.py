"""What is given to a buffer is checked as it is traced, completed where it says nothing, and stored bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows, make_buffer
from jaxcl.errors import UserError

RECORD = {"x": jax.ShapeDtypeStruct((3,), np.uint8), "y": jax.ShapeDtypeStruct((), np.float32)}
K = 4


@functools.cache
def buffer_of(devices=0, tier="device", **options):
    mesh = mesh_lib.make_mesh(jax.devices()[:devices]) if devices else None
    return make_buffer(RECORD, **{"capacity": 32, "representatives": 8, "mesh": mesh, "tier": tier, **options})


def rows(n=8, **changed):
    """Whole rows, with some leaves changed; "x" and "y" are those of the record."""
    ids = np.arange(n, dtype=np.int32)
    record = {"x": np.repeat(ids[:, None], 3, 1).astype(np.uint8), "y": ids.astype(np.float32)}
    record |= {name: changed.pop(name) for name in ("x", "y") if name in changed}
    fields = {"label": ids % K, "id": ids, "valid": np.ones(n, bool)} | changed
    return Rows(record, **fields)


WRONG = {
    "no batch axis": ({"x": np.zeros(3, np.uint8)}, "rows.record.x: uint8 [3]", "uint8 [3, 3]"),
    "another shape": ({"x": np.zeros((8, 1), np.uint8)}, "rows.record.x: uint8 [8, 1]", "uint8 [8, 3]"),
    "another length": ({"y": np.zeros(7, np.float32)}, "rows.record.y: float32 [7]", "float32 [8]"),
    "another dtype": ({"x": np.full((8, 3), 300.7, np.float32)}, "rows.record.x: float32 [8, 3]", "uint8 [8, 3]"),
    "integers for floats": ({"y": np.ones(8, np.int32)}, "rows.record.y: int32 [8]", "float32 [8]"),
    "64 bits": ({"y": np.ones(8, np.float64)}, "rows.record.y: float64 [8]", "float32 [8]"),
    "labels too short": ({"label": np.zeros(7, np.int32)}, "rows.label: int32 [7]", "int32 [8]"),
    "validity too long": ({"valid": np.ones(9, bool)}, "rows.valid: bool [9]", "bool [8]"),
    "validity of integers": ({"valid": np.ones(8, np.int32)}, "rows.valid: int32 [8]", "bool [8]"),
    "ids of floats": ({"id": np.arange(8.0, dtype=np.float32)}, "rows.id: float32 [8]", "int32 [8]"),
    "ids of 2**40": ({"id": np.full(8, 2**40)}, "rows.id: int64 [8]", "int32 [8]"),
}


@pytest.mark.parametrize("devices", [0, 4])
@pytest.mark.parametrize("wrong", WRONG)
def test_rows_that_do_not_fit_are_refused_by_one_line(wrong, devices):
    changed, named, allowed = WRONG[wrong]
    buffer = buffer_of(devices)
    with pytest.raises(UserError) as error:
        buffer.insert(buffer.init(), rows(**changed), jax.random.key(0))
    text = str(error.value)
    assert text.startswith(named) and allowed in text and "\n" not in text


def test_rows_are_checked_inside_jit_and_shard_map():
    """Where the functions of one device are used, in other people's programs."""
    mesh, buffer = mesh_lib.make_mesh(jax.devices()[:4]), buffer_of(4)
    insert = mesh_lib.on_mesh(mesh, buffer.local.insert, (P("data"), P("data"), P()), P("data"))
    with pytest.raises(UserError, match=r"rows.record.x: uint8 \[2, 1\] is not allowed, give uint8 \[2, 3\]"):
        insert(buffer.init(), rows(x=np.zeros((8, 1), np.uint8)), jax.random.key(0))
    with pytest.raises(UserError, match=r"rows.record.y: int32 \[8\]"):
        jax.jit(buffer_of().insert)(buffer_of().init(), rows(y=np.ones(8, np.int32)), jax.random.key(0))


@pytest.mark.parametrize("handover", ["outputs", "callback"])
def test_rows_of_the_host_tier_are_checked(handover):
    """Integers in a record of floats came back as their bits."""
    mesh, buffer = mesh_lib.make_mesh(jax.devices()[:2]), buffer_of(2, "host", handover=handover)
    turn = mesh_lib.on_mesh(
        mesh, lambda s, r, k: buffer.local.turn(s, r, k, (), jnp.int32(0)), (P("data"), P("data"), P()), P("data")
    )
    with pytest.raises(UserError, match=r"rows.record.y: int32 \[4\] is not allowed, give float32 \[4\]"):
        turn(buffer.init(), rows(y=np.ones(8, np.int32)), jax.random.key(0))


def test_other_pytrees_and_other_types_are_refused():
    buffer = buffer_of()
    with pytest.raises(UserError, match=r"rows.record: the pytree .*'x'.* is not allowed, give .*'y'"):
        buffer.insert(buffer.init(), Rows({"x": np.zeros((8, 3), np.uint8)}), jax.random.key(0))
    with pytest.raises(UserError, match=r"rows: dict is not allowed, give jaxcl\.buffer\.Rows"):
        buffer.insert(buffer.init(), {"x": 0}, jax.random.key(0))
    with pytest.raises(UserError, match="rows: 6 rows are not allowed, give a multiple of the number of devices, 4"):
        buffer_of(4).insert(buffer_of(4).init(), rows(6), jax.random.key(0))
    with pytest.raises(UserError, match=r"rows.label: missing, give int32 \[8\]"):
        balanced = buffer_of(policy="class_balanced", num_classes=K)
        balanced.insert(balanced.init(), rows(label=None), jax.random.key(0))


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({}, "record: holds no array"),
        ({"a": [1.0]}, "record.a.0: 1.0 is not allowed, give an array"),
        (np.zeros(3, np.int64), "record: int64 is not allowed, give int32 or set jax_enable_x64"),
        ({"a": np.array(["word"])}, "record.a: <U4 is not allowed"),
        (jax.ShapeDtypeStruct((2,), "float4_e2m1fn"), "record: float4_e2m1fn is not allowed"),
    ],
)
def test_records_that_cannot_be_stored_are_refused(record, text):
    with pytest.raises(UserError) as error:
        make_buffer(record, capacity=8, representatives=2)
    assert str(error.value).startswith(text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"representatives": 16.0}, "buffer.representatives: 16.0 is not allowed, give an integer"),
        ({"representatives": 33}, "buffer.representatives: 33 is not allowed, give at most 32"),
        ({"representatives": True}, "buffer.representatives: True is not allowed"),
        ({"capacity": 32.0}, "buffer.capacity: 32.0 is not allowed, give an integer"),
        ({"capacity": 2**31 - 1}, "buffer.capacity: 2147483647 is not allowed"),
        ({"capacity": 2**30, "devices": 4, "memory": "independent"}, "buffer.capacity: 4294967296 is not allowed"),
        ({"repeats": "distinct", "num_ids": 2.5}, "buffer.num_ids: 2.5 is not allowed, give a positive integer"),
        (
            {"devices": 4, "axis": "rows"},
            "buffer.axis: 'rows' is not allowed, give one or several of the mesh's axes, data, fsdp, model",
        ),
        ({"devices": 4, "axis": ("data", "data")}, "buffer.axis: ('data', 'data') is not allowed"),
    ],
)
def test_sizes_that_are_not_allowed_are_refused(options, text):
    with pytest.raises(UserError) as error:
        buffer_of(**options)
    assert str(error.value).startswith(text)


@pytest.mark.parametrize("policy", ["class_random", "class_balanced", "herding"])
def test_labels_outside_the_classes_are_counted_and_not_stored(policy):
    """`class_random` let eight rows labelled 7 of K = 4 overwrite all of class 3."""
    buffer = buffer_of(policy=policy, num_classes=K, accept=1.0, capacity=8)
    state = buffer.insert(buffer.init(), rows(), jax.random.key(0))
    before = np.sort(state.id)
    for label in (7, K, -1):
        state = buffer.insert(
            state, rows(id=np.arange(100, 108, dtype=np.int32), label=np.full(8, label, np.int32)), jax.random.key(1)
        )
    np.testing.assert_array_equal(np.sort(state.id), before)
    found = buffer.stats(state)
    assert found["refused"] == 24 and found["class_histogram"] == [2] * K


def test_ids_that_cannot_be_are_counted_and_not_stored():
    """Negative ones, and those beyond `num_ids`, of which `distinct` stored copies. Invalid rows are not counted."""
    buffer = buffer_of(2, repeats="distinct", num_ids=8)
    ids = np.array([0, 1, -1, 8, 9, 2, 2, -5], np.int32)
    state = buffer.insert(buffer.init(), rows(id=ids, valid=np.arange(8) < 7), jax.random.key(0))
    found = buffer.stats(state)
    assert (found["refused"], found["rows"], found["distinct_ids"]) == (3, 3, 3)


@pytest.mark.parametrize("memory", ["sharded", "replicated", "independent"])
def test_labels_ids_and_validity_may_be_left_out(memory):
    """Ids are then numbers that no other row of the buffer has; every copy of a row has the same one."""
    buffer = buffer_of(4, memory=memory, capacity=64)
    state, insert = buffer.init(), jax.jit(buffer.insert, donate_argnums=0)
    for step in range(3):
        y = jnp.arange(8 * step, 8 * step + 8, dtype=jnp.float32)
        state = insert(state, Rows({"x": jnp.zeros((8, 3), jnp.uint8), "y": y}), jax.random.key(step))
    ids, y = np.asarray(state.id), np.asarray(state.record["y"])
    pairs = {(int(i), float(value)) for i, value in zip(ids[ids >= 0], y[ids >= 0], strict=True)}
    assert len(pairs) == len({i for i, _ in pairs}) == len({value for _, value in pairs}) == 24
    assert not np.asarray(state.label).any() and buffer.stats(state)["refused"] == 0


@pytest.mark.parametrize("memory", ["sharded", "replicated", "independent"])
@pytest.mark.parametrize("exchange", ["mix", "local"])
def test_size_and_can_draw(memory, exchange):
    buffer = buffer_of(4, memory=memory, exchange=exchange, capacity=64)
    state = buffer.init()
    copies = 4 if memory == "independent" else 1
    assert int(buffer.size(state)) == 0 and not buffer.can_draw(state)
    # Of eight rows the first device's two are not valid: 6 rows of 8 in all, and none in its own shard.
    state = buffer.insert(state, rows(valid=np.arange(8) >= 2), jax.random.key(0))
    assert int(buffer.size(state)) == 6 * copies
    drawn = buffer.draw(state, jax.random.key(1))
    alone = memory == "independent" or (memory, exchange) == ("replicated", "local")  # two rows of six for each device
    assert bool(buffer.can_draw(state)) == bool(np.asarray(drawn.valid).all()) == alone
    state = buffer.insert(state, rows(), jax.random.key(2))
    assert int(buffer.size(state)) == 14 * copies and buffer.can_draw(state)


@pytest.mark.parametrize("devices", [0, 4])
def test_insert_and_draw_is_an_insert_and_a_draw_in_place(devices):
    buffer = buffer_of(devices)
    insert_key, draw_key = jax.random.split(jax.random.key(3))
    once = buffer.insert(buffer.init(), rows(), insert_key)
    drawn = buffer.draw(once, draw_key)
    before = buffer.init()
    state, both = buffer.insert_and_draw(before, rows(), jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, (once, drawn), (state, both))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.record))


@pytest.mark.parametrize("devices", [0, 1, 4])
def test_no_gradient_goes_through_a_draw_on_any_mesh(devices):
    """On a mesh rows travel as bytes, of which there is no gradient; on one device there was one."""
    buffer = buffer_of(devices)

    def loss(weight, y):
        state = buffer.insert(buffer.init(), Rows({"x": jnp.zeros((8, 3), jnp.uint8), "y": y}), jax.random.key(0))
        return jnp.sum((weight * buffer.draw(state, jax.random.key(1)).record["y"]) ** 2)

    by_weight, by_rows = jax.jit(jax.grad(loss, argnums=(0, 1)))(2.0, jnp.arange(8.0, dtype=jnp.float32))
    assert by_weight == 4 * np.sum(np.arange(8.0) ** 2) and not np.asarray(by_rows).any()


def test_a_buffer_of_other_devices_is_refused():
    """A buffer made for 4 devices gave 32 "valid" rows of 8 distinct ones inside a `shard_map` of 8."""
    mesh, buffer = mesh_lib.make_mesh(jax.devices()[:8]), buffer_of(4)
    draw = mesh_lib.on_mesh(mesh, lambda key: buffer.local.draw(buffer.local.init(), key), (P(),), P("data"))
    with pytest.raises(UserError, match="buffer: made for 4 devices along the axis 'data', used where it has 8"):
        draw(jax.random.key(0))
    with pytest.raises(
        UserError, match="buffer: made for 4 devices along the axis 'data', used outside shard_map over it"
    ):
        buffer.local.init()


@pytest.mark.parametrize("options", [{"exchange": "local"}, {"memory": "independent"}])
def test_an_insert_and_a_draw_with_one_key_are_independent(options):
    """Of rows just inserted no more are drawn than of others. With one key for both 1,065 were, where 858 are expected."""
    devices, warm, counted = 8, 3, 25
    buffer = buffer_of(devices, capacity=devices * 32, representatives=devices * 8, **options)

    def step(state, given):
        key, first = given
        ids = first + jnp.arange(devices * 16, dtype=jnp.int32)
        record = {"x": jnp.zeros((len(ids), 3), jnp.uint8), "y": ids.astype(jnp.float32)}
        state = buffer.insert(state, Rows(record, id=ids), key)
        return state, (state.id, buffer.draw(state, key).id)

    steps = warm + counted
    first = jnp.arange(steps, dtype=jnp.int32) * devices * 16
    _, (stored, drawn) = jax.jit(lambda s: jax.lax.scan(step, s, (jax.random.split(jax.random.key(0), steps), first)))(
        buffer.init()
    )
    stored, drawn = (np.asarray(x).reshape(steps, devices, -1)[warm:] for x in (stored, drawn))
    since = np.asarray(first)[warm:, None]
    fresh, hits = (stored >= since[..., None]).sum(-1), (drawn >= since[..., None]).sum()
    size, r = stored.shape[-1], drawn.shape[-1]
    expected, variance = r * fresh / size, r * fresh / size * (1 - fresh / size) * (size - r) / (size - 1)
    assert variance.sum() > 50 and abs(hits - expected.sum()) < 3.9 * variance.sum() ** 0.5  # 1e-4
