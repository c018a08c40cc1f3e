"""On any mesh the buffer is that of as many devices in a row: its axes have any names and order, other axes hold copies."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcl.buffer import Rows, make_buffer
from jaxcl.buffer.exchange import mix
from jaxcl.errors import UserError
from tests import oracle

K, CAPACITY, DRAWN = 4, 22, 16
RECORD = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), oracle.record_of(np.arange(1)))


def mesh_with(explicit: bool = False, **axes: int) -> Mesh:
    size = int(np.prod(list(axes.values())))
    devices = np.array(jax.devices()[:size]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=((AxisType.Auto, AxisType.Explicit)[explicit],) * len(axes))


def batch(step: int) -> Rows:
    """Rows that never come again; the first devices get fewer of them."""
    ids = np.arange(12, dtype=np.int32) + 100 * step
    valid = np.random.default_rng(step).random(12) < np.linspace(0.2, 1, 12)
    return Rows(oracle.record_of(ids), (ids % K).astype(np.int32), ids, valid)


def made(mesh: Mesh | None, axis: str | tuple[str, ...] = "data", **options):
    options = {"capacity": CAPACITY, "representatives": DRAWN, "num_classes": K, "accept": 0.5, **options}
    return make_buffer(RECORD, mesh=mesh, axis=axis, **options)


def course(buffer, place=lambda rows: rows):
    """Every draw of a few steps, what is told after them, and the metadata at the end."""
    state, seen = buffer.init(), []
    for step in range(5):
        state, drawn = buffer.insert_and_draw(state, place(batch(step)), jax.random.key(step))
        seen.append(drawn)
    seen.append(buffer.draw(state, jax.random.key(99)))
    told = int(buffer.size(state)), bool(buffer.can_draw(state)), buffer.stats(state)
    return jax.device_get((seen, {"id": state.id, "label": state.label, "meta": state.meta})), told


@functools.cache
def expected():
    """Of the device tier on four devices in a row."""
    return course(made(mesh_with(data=4)))


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "axes, axis, explicit, tier",
    [
        ({"data": 4, "model": 2}, "data", False, "device"),
        ({"model": 2, "data": 4}, "data", False, "host"),
        ({"a": 2, "b": 2, "c": 2}, ("c", "a"), True, "device"),
        ({"a": 2, "b": 2, "c": 2}, ("a", "b"), True, "host"),
    ],
)
def test_the_same_rows_are_stored_and_drawn_on_any_mesh(axes, axis, explicit, tier):
    """Plain arrays; on explicit axes also arrays that lie elsewhere, and inside `jax.set_mesh`."""
    mesh = mesh_with(explicit, **axes)
    buffer = made(mesh, axis, tier=tier)
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        (seen, stored), told = course(buffer, place if explicit else lambda rows: rows)
    (wanted, wanted_stored), wanted_told = expected()
    assert told == wanted_told and DRAWN < told[0] <= CAPACITY and told[1]
    assert_same(stored, wanted_stored)
    assert_same(seen, wanted)
    for drawn in seen:
        oracle.assert_whole(
            jax.tree.map(lambda x: x[drawn.valid], drawn.record),  # noqa: B023
            drawn.label[drawn.valid],
            drawn.id[drawn.valid],
            K,
        )


def test_bytes_are_those_that_the_devices_hold():
    for mesh, axis in (
        (mesh_with(data=4, model=2), "data"),
        (mesh_with(a=2, b=2, c=2), ("a", "b", "c")),
    ):
        for tier in ("device", "host"):
            buffer = made(mesh, axis, tier=tier)
            held = sum(part.data.nbytes for x in jax.tree.leaves(buffer.init()) for part in x.addressable_shards)
            rows = sum(x.nbytes for x in buffer.host.payload().values()) if buffer.host else 0
            assert buffer.num_bytes == held + rows


def test_all_replicas_of_a_shard_would_call_back():
    with pytest.raises(UserError, match=r"buffer.handover: 'callback' .* outputs: 8 devices hold 4 shards"):
        made(mesh_with(data=4, model=2), tier="host", handover="callback")


def scanned(buffer, mesh, axis, check_vma):
    """Two steps under a user's own `shard_map`, the empty memory being the first carry."""

    def steps(rows, key):
        def step(carry, key):
            insert_key, draw_key = jax.random.split(key)
            state = buffer.local.insert(carry[0], rows, insert_key)
            return (state, buffer.local.draw(state, draw_key)), None

        return lax.scan(step, (buffer.local.init(), buffer.local.no_rows()), jax.random.split(key, 2))[0]

    spec = PartitionSpec(axis)
    mapped = jax.shard_map(steps, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=check_vma)
    return jax.jit(mapped)


CHECKED = [
    {},
    {"policy": "class_balanced", "sampling": "class_balanced"},
    {"policy": "herding", "exchange": "balance", "repeats": "distinct", "num_ids": 500},
    *({"policy": policy} for policy in ("class_random", "fifo")),
    *({"memory": memory} for memory in ("replicated", "independent")),
    {"exchange": "local"},
]


@pytest.mark.parametrize(
    "options", [pytest.param(x, marks=[pytest.mark.slow] * (i > 2)) for i, x in enumerate(CHECKED)]
)
def test_replication_may_be_checked(options):
    mesh = mesh_with(data=4, model=2)
    buffer = made(mesh, **options)
    found, wanted = (scanned(buffer, mesh, "data", checked)(batch(0), jax.random.key(0)) for checked in (True, False))
    assert jnp.any(found[1].valid)
    assert_same(jax.device_get(found), jax.device_get(wanted))


@pytest.mark.parametrize("tier", ["device", "host"])
def test_weights_may_be_split_over_another_axis(tier):
    """The model axis is left to the compiler, also for what the host tier hands over."""
    mesh = mesh_with(data=4, model=2)
    buffer = made(mesh, tier=tier)
    rows = PartitionSpec("data")

    def step(weights, state, batch, staged, arrived):
        insert_key, draw_key = jax.random.split(jax.random.key(0))
        if tier == "device":
            state = buffer.local.insert(state, batch, insert_key)
            drawn, staged, handed = buffer.local.draw(state, draw_key), (), ()
        else:
            (drawn,) = buffer.local.receive(staged, arrived)
            state, staged, handed = buffer.local.turn(state, batch, insert_key, [draw_key], jnp.int32(0))
        scores = drawn.record["logits"] @ weights
        return scores, state, drawn, staged, handed

    weights = jax.device_put(np.eye(3, 4, dtype=np.float32), NamedSharding(mesh, PartitionSpec(None, "model")))
    mapped = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(PartitionSpec(), rows, rows, rows, rows),
            out_specs=rows,
            axis_names={"data"},
            check_vma=False,
        )
    )
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, rows))
    state = buffer.init()
    if tier == "device":
        scores, _, drawn, _, _ = mapped(weights, state, place(batch(0)), (), None)
    else:
        staged = (buffer.no_rows(),)
        with buffer.host.serving(0, staged) as store:
            _, state, _, staged, handed = mapped(weights, state, place(batch(0)), staged, store.take())
            store.passed(handed)
            scores, _, drawn, _, _ = mapped(weights, state, place(batch(1)), staged, store.take())
    valid = np.asarray(drawn.valid)
    assert valid.sum() == batch(0).valid.sum()
    record = {name: np.asarray(x)[valid] for name, x in drawn.record.items()}
    oracle.assert_whole(record, np.asarray(drawn.label)[valid], np.asarray(drawn.id)[valid], K)
    np.testing.assert_array_equal(scores[valid], record["logits"] @ np.eye(3, 4, dtype=np.float32))


def test_two_hops_go_along_several_axes(monkeypatch):
    """Chosen above sixteen devices only; the draw is that of one hop, as it is exact in both."""
    wanted = expected()[0]
    monkeypatch.setattr(mix, "compact_hops", lambda per_device, shards: mix.Hops(4, 2, DRAWN // 2, DRAWN // 4))
    buffer = made(mesh_with(a=2, b=2), ("a", "b"))
    assert buffer.local.draw.args[0].routes[0].rows_moved == 2 * DRAWN // 2 + 2 * DRAWN // 4
    assert_same(course(buffer)[0], wanted)


def test_a_buffer_of_other_devices_is_refused():
    buffer, eight = made(mesh_with(data=4)), mesh_with(data=8)
    with pytest.raises(UserError, match="made for 4 devices along the axis 'data', used where it has 8"):
        rows = jax.tree.map(lambda x: x[:8], batch(0))
        scanned(buffer, eight, "data", False).lower(rows, jax.random.key(0))
    for call in (buffer.local.init, lambda: buffer.local.draw(buffer.init(), jax.random.key(0))):
        with pytest.raises(UserError, match="used outside shard_map over it"):
            call()
    with pytest.raises(UserError, match=r"rows: 12 rows .* a multiple of the number of devices, 8"):
        made(eight).insert(made(eight).init(), batch(0), jax.random.key(0))
