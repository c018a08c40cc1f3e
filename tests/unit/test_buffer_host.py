"""The host tier: it means what the device tier means, bit for bit, and its threads keep their promises."""

import contextlib
import dataclasses
import itertools
import shutil
import threading
import traceback

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows, make_buffer
from jaxcl.buffer.host import Handover, HandoverError, Store
from jaxcl.buffer.host import rows as rows_lib
from jaxcl.errors import UserError
from jaxcl.strategies import make_strategy
from jaxcl.training.step_host import HostStep
from tests import oracle
from tests.rig import Rig, make_batch

K, PER_DEVICE, DRAWN = 4, 3, 16
RECORD = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), oracle.record_of(np.arange(1)))


def untimed(name):
    return contextlib.nullcontext()


def batch_of(mesh, step) -> Rows:
    """Rows that never come again; devices get different numbers of them, so that shards differ in size."""
    ids = np.arange(PER_DEVICE * mesh.size, dtype=np.int32) + 100 * step
    valid = np.random.default_rng(step).random(ids.shape) < np.linspace(0.1, 1, len(ids))
    return mesh_lib.shard_rows(mesh, Rows(oracle.record_of(ids), (ids % K).astype(np.int32), ids, valid))


class Small:
    """A loop without a model: insert and two draws a step, what has arrived is returned."""

    def __init__(self, mesh, tier, capacity=40, **options):
        self.mesh = mesh
        self.buffer = make_buffer(
            RECORD, capacity=capacity, representatives=DRAWN, num_classes=K, mesh=mesh, tier=tier, **options
        )

        def step(state, batch, arrived=None):
            number, shard, staged = state
            local = self.buffer.local
            insert_key, *draw_keys = jax.random.split(jax.random.fold_in(jax.random.key(3), number), 3)
            if tier == "device":
                shard = local.insert(shard, batch, insert_key)
                return (number + 1, shard, local.stage(shard, draw_keys)), staged, ()
            drawn = local.receive(staged, arrived)
            shard, staged, handover = local.turn(shard, batch, insert_key, draw_keys, number)
            return (number + 1, shard, staged), drawn, handover

        split, whole = PartitionSpec("data"), PartitionSpec()
        state = (whole, split, split)
        self.step = jax.jit(
            jax.shard_map(
                step, mesh=mesh, in_specs=(state, split, split), out_specs=(state, split, split), check_vma=False
            )
        )
        number = mesh_lib.replicate(mesh, np.int32(0))
        self.state = (number, self.buffer.init(), (self.buffer.no_rows(), self.buffer.no_rows()))

    def prepared(self, batch):
        if self.buffer.host is None:
            return lambda state, batch: self.step(state, batch, None)[:2]
        return HostStep(self.buffer.host, self.step).prepare(self.state, batch, untimed)

    def __call__(self, steps, batch_of=batch_of):
        """What each step replays."""
        store, seen = self.buffer.host, []
        served = contextlib.nullcontext() if store is None else store.serving(int(self.state[0]), self.state[2])
        with served:
            step = self.prepared(batch_of(self.mesh, steps[0]))
            for number in steps:
                self.state, drawn = step(self.state, batch_of(self.mesh, number))
                seen.append(jax.device_get(drawn))
        return seen


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "devices, options",
    [
        (1, {}),
        (2, {"handover": "outputs"}),
        (4, {"policy": "class_balanced", "sampling": "class_balanced"}),
        (4, {"memory": "replicated", "handover": "outputs"}),
        (4, {"memory": "independent"}),
        (4, {"repeats": "distinct", "num_ids": 5000}),
        pytest.param(8, {"exchange": "balance"}, marks=pytest.mark.exhaustive),
        (8, {"exchange": "local", "handover": "outputs"}),
        pytest.param(16, {"policy": "fifo", "queue": 1, "handover": "outputs"}, marks=pytest.mark.exhaustive),
    ],
)
def test_both_tiers_store_and_draw_the_same(devices, options, mesh_of):
    mesh = mesh_of(devices)
    device, host = Small(mesh, "device", **options), Small(mesh, "host", **options)
    expected, found = device(range(12)), host(range(12))
    assert expected[-1][0].valid.any() and (expected[-1][0].id != expected[-1][1].id).any()
    assert_same(found, expected)
    shard = jax.device_get(device.state[1])
    assert_same(jax.device_get(host.state[1]), dataclasses.replace(shard, record={}))
    payload = host.buffer.host.payload()
    for name, x in shard.record.items():
        stored = np.concatenate([payload[i][name] for i in range(devices)])
        np.testing.assert_array_equal(stored, x.astype(stored.dtype), err_msg=name)
        assert stored.dtype == RECORD[name].dtype


@pytest.mark.parametrize("exchange", ["mix", "balance"])
def test_a_draw_that_does_not_fit_is_exact_too(exchange, mesh_of):
    """All rows lie on one shard at first: it supplies the whole draw, more than is gathered otherwise."""
    mesh, narrow = mesh_of(4), 5

    def batches(mesh, step):
        rows = batch_of(mesh, step)
        mine = np.arange(len(rows.id)) < (PER_DEVICE if step < 8 else 99)
        return dataclasses.replace(rows, valid=mesh_lib.shard_rows(mesh, mine))

    seen, widths = {}, set()
    for tier in ("device", "host"):
        small = Small(mesh, tier, exchange=exchange)
        if tier == "host":
            assert small.buffer.host.narrow > DRAWN // 4
            small.buffer.host.narrow = narrow
            gather = small.buffer.host._gather

            def spy(wanted, wide, gather=gather):
                widths.add(wide)
                return gather(wanted, wide)

            small.buffer.host._gather = spy
        seen[tier] = small(range(25), batches)
    assert widths == {True, False}
    assert_same(seen["host"], seen["device"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices, name, handover",
    [
        (1, "er", "callback"),
        (4, "er", "outputs"),
        (8, "er", "callback"),
        (1, "der_pp", "outputs"),
        (4, "der_pp", "callback"),
        (8, "der_pp", "outputs"),
    ],
)
def test_training_takes_the_same_course(devices, name, handover, mesh_of):
    """Parameters, metrics and memory after every step, bit for bit; der_pp stores float logits and draws twice."""
    courses = []
    for tier in ("device", "host"):
        rig = Rig(mesh_of(devices), make_strategy(name), memory={"tier": tier, "handover": handover})
        state, course = rig.state(), []
        with contextlib.ExitStack() as stack:
            if tier == "host":
                stack.enter_context(rig.buffer.host.serving(0, state.staged))
            step = rig.train_step.prepare(state, rig.rows(make_batch(0)), untimed)
            for t in range(12):
                state, metrics = step(state, rig.rows(make_batch(t)))
                course.append(jax.device_get((metrics, state.params, state.buffer.id)))
        courses.append(course)
    assert courses[0][-1][0]["replayed"] > 0
    assert_same(courses[1], courses[0])


def test_a_saved_memory_goes_on_as_if_nothing_had_been(mesh_of, tmp_path):
    whole, first, second = (Small(mesh_of(4), "host", path=str(tmp_path / name)) for name in "abc")
    expected = whole(range(12))
    found = first(range(7))
    saved = {device: rows.copy() for device, rows in first.buffer.host.payload().items()}
    second.state = jax.tree.map(
        lambda new, old: jax.device_put(np.asarray(old), new.sharding), second.state, first.state
    )
    second.buffer.host.restore(saved)
    assert_same(found + second(range(7, 12)), expected)
    assert_same(second.buffer.host.payload(), whole.buffer.host.payload())
    rows = 10 * whole.buffer.host.row.itemsize
    assert (tmp_path / "a" / "shard-00003.rows").stat().st_size == rows + len(rows_lib.MARK)


# The store alone: hand-overs of step t put value t into slot t mod SLOTS of every device, and ask for that slot.
SLOTS, ROW = 5, {"x": jax.ShapeDtypeStruct((2,), np.int32)}


def made(step, device, sends=1) -> Handover:
    rows = np.array([[step, device]], np.int32).view(np.uint8)
    slot = np.array([step % SLOTS], np.int32)
    return Handover(np.array([step]), slot, rows, slot[None, None].repeat(sends, 1), np.array([False]))


def store_on(mesh, queue=3) -> Store:
    return Store(ROW, SLOTS, 1, mesh, mesh_lib.AXIS, None, queue)


def assert_no_writer():
    assert not [t for t in threading.enumerate() if t.name == "buffer-writer"]


def test_hand_overs_of_many_threads_are_applied_in_the_order_of_steps(mesh_of):
    store, steps = store_on(mesh_of(8)), 200
    seen = []
    with store.serving(0):

        def device(number):
            for step in range(steps):
                store.hand_over(np.int32(number), *made(step, number))

        threads = [threading.Thread(target=device, args=(d,)) for d in reversed(range(8))]
        for thread in threads:
            thread.start()
        for step in range(steps):
            store.passed()
            with store._changed:  # as step's rows may be followed at once by the next step's
                store._changed.wait_for(lambda: store._next > step)  # noqa: B023
            seen.append(store._next - 1)
        for thread in threads:
            thread.join()
    assert seen == sorted(seen) and seen[-1] == steps - 1
    for number, rows in store.payload().items():
        assert rows["x"].tolist() == [[steps - SLOTS + i, number] for i in range(SLOTS)]
    assert_no_writer()


def test_each_step_is_answered_with_its_own_rows(mesh_of):
    store = store_on(mesh_of(2))
    with store.serving(7):
        for step in range(7, 20):
            for device in (1, 0):
                store.give(device, made(step, device))
            store.passed()
            arrived = np.asarray(store.take()).view(np.int32)
            np.testing.assert_array_equal(arrived, [[step, 0], [step, 1]])


def test_a_slow_writer_holds_the_steps_back(mesh_of):
    """The writer goes on only when the giver can do no more: no more than `queue` steps' rows ever wait."""
    queue, steps = 3, 12
    store, applied, most = store_on(mesh_of(1), queue), itertools.count(), []
    apply = store._apply

    def slow(handovers):
        left = steps - next(applied)
        with store._changed:  # an unbounded queue would grow to all that is left
            assert store._changed.wait_for(lambda: len(store._waiting) >= min(queue, left), timeout=60)
            blocked = store._changed.wait_for(lambda: len(store._waiting) > queue, timeout=0.02)
            most.append(len(store._waiting) if not blocked else steps)
        return apply(handovers)

    store._apply = slow
    with store.serving(0):
        for step in range(steps):
            store.give(0, made(step, 0))
            store.passed()
    assert max(most) == queue and len(most) == steps
    assert store.payload()[0]["x"][:, 0].tolist() == [10, 11, 7, 8, 9]


@pytest.mark.parametrize(
    "given, message",
    [
        ([(0, 4), (1, 4), (1, 6)], "device 1 .* step 6, the one of step 5 is lost"),
        ([(0, 4), (1, 4), (0, 5), (0, 5)], "device 0 .* step 5, that of a step handed over before"),
        ([(0, 4), (1, 4), (0, 3)], "device 0 .* step 3, that of a step handed over before"),
        ([(0, 4), (0, 5), (1, 4)], "hand-over of step 5 of device 1 is lost"),
    ],
)
def test_a_lost_late_or_doubled_hand_over_ends_the_run(given, message, mesh_of):
    store = store_on(mesh_of(2))
    with pytest.raises(HandoverError, match=message), store.serving(4):
        for device, step in given:
            store.give(device, made(step, device))
        store.passed()
        store.passed()
        store.take(finished=lambda: True)
    assert_no_writer()


def test_an_error_of_the_writer_ends_the_run_with_its_own_traceback(mesh_of):
    rig = Rig(mesh_of(4), make_strategy("er"), memory={"tier": "host"})
    state, store = rig.state(), rig.buffer.host

    def break_down(handovers):
        raise OSError("the disk is on fire")

    with pytest.raises(OSError, match="on fire") as caught, store.serving(0, state.staged):
        step = rig.train_step.prepare(state, rig.rows(make_batch(0)), untimed)
        for t in itertools.count():
            if t == 3:
                store._apply = break_down
            assert t < 5, "the error was not noticed"
            state, _ = step(state, rig.rows(make_batch(t)))
    assert any(frame.name == "break_down" for frame in traceback.extract_tb(caught.value.__traceback__))
    assert_no_writer()


@pytest.mark.slow
@pytest.mark.parametrize("handover", ["callback", "outputs"])
def test_ctrl_c_loses_no_insert(handover, mesh_of):
    stopped, whole = (Small(mesh_of(4), "host", handover=handover) for _ in range(2))
    whole(range(5))
    store = stopped.buffer.host
    with pytest.raises(KeyboardInterrupt), store.serving(0, stopped.state[2]):
        step = stopped.prepared(batch_of(stopped.mesh, 0))
        for number in range(5):
            stopped.state, _ = step(stopped.state, batch_of(stopped.mesh, number))
        raise KeyboardInterrupt  # while the last step may still be on its way
    assert_same(store.payload(), whole.buffer.host.payload())
    assert_no_writer()


def test_a_memory_that_cannot_fit_is_refused_at_once(mesh_of, tmp_path, monkeypatch):
    options = {"representatives": 4, "mesh": mesh_of(4), "tier": "host"}
    rows = 10**9
    need = rows * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(RECORD))
    monkeypatch.setattr(rows_lib, "free_memory", lambda: 10**9)
    with pytest.raises(UserError, match=f"buffer.capacity: .* {need} bytes of host memory and {10**9} are there"):
        make_buffer(RECORD, capacity=rows, **options)
    usage = shutil.disk_usage(tmp_path)._replace(free=12345)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=rf"buffer.path: the rows need {need} bytes in .* and 12345 are there"):
        make_buffer(RECORD, capacity=rows, path=str(tmp_path), **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"buffer.path: .* cannot be written"):
        make_buffer(RECORD, capacity=40, path=str(tmp_path / "file"), **options)
    for field, value in {"tier": "disk", "handover": "post", "queue": 0, "mesh": None}.items():
        with pytest.raises(UserError, match=f"buffer.{'tier' if field == 'mesh' else field}: "):
            make_buffer(RECORD, capacity=40, **options | {field: value})


@pytest.mark.parametrize("mesh", [0, 4])
@pytest.mark.parametrize("memory", ["sharded", "replicated"])
def test_rows_that_no_device_can_hold_are_refused_before_they_are_made(mesh, memory, mesh_of, monkeypatch):
    """On a CPU, whose devices share the host's memory; also where the number of bytes is no int32."""
    monkeypatch.setattr(rows_lib, "free_memory", lambda: 10**9)
    mesh, row = mesh_of(mesh) if mesh else None, 8 + sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(RECORD))
    copies = 4 if mesh and memory == "replicated" else 1
    for capacity in (4 * 10**7, 2 * 10**9):
        need = capacity * row * copies
        with pytest.raises(UserError, match=f"buffer.capacity: .* {need} bytes of host memory and {10**9} are there"):
            make_buffer(RECORD, capacity=capacity, representatives=4, mesh=mesh, memory=memory)
    with pytest.raises(
        UserError, match=f"buffer.capacity: .* {8 * 4 * 10**8} bytes of host memory and {10**9} are there"
    ):
        rows_lib.check_fits("buffer.capacity", 8 * 10**8, jax.devices()[:4])


class Accelerator:
    platform = "gpu"

    def __init__(self, statistics):
        self.memory_stats = lambda: statistics


def test_the_memory_of_an_accelerator_is_asked_for():
    silent, half_full = Accelerator(None), Accelerator({"bytes_limit": 100, "bytes_in_use": 40})
    rows_lib.check_fits("buffer.capacity", 60, [silent, half_full])
    with pytest.raises(
        UserError, match=r"buffer.capacity: the rows need 61 bytes of the memory of .* and 60 are there"
    ):
        rows_lib.check_fits("buffer.capacity", 61, [silent, half_full])


def test_what_is_free_is_measured():
    assert 2**20 < rows_lib.free_memory() < 2**50


def test_the_device_holds_no_record(mesh_of):
    few, many = (Small(mesh_of(2), "host", capacity=c) for c in (40, 4000))
    stored = jax.tree.leaves(many.state[1])
    assert sum(x.nbytes for x in stored) < 4000 * 12  # label, id and the policy's few numbers
    assert many.buffer.num_bytes - few.buffer.num_bytes == 3960 * (8 + many.buffer.host.row.itemsize)
