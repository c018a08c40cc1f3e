"""A memory in files: NumPy alone reads it, it comes back bit for bit or, on other devices, row for row."""

import functools
import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import POLICIES, Rows, folder, make_buffer
from jaxcl.buffer.reshard import reshard
from jaxcl.errors import UserError
from tests import oracle

K, CAPACITY, BATCH = 5, 43, 16
RECORD = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), oracle.record_of(np.arange(1)))


@functools.cache
def buffer_on(shards, policy="reservoir", **options):
    mesh = mesh_lib.make_mesh(jax.devices()[:shards]) if shards else None
    sizes = {"capacity": CAPACITY, "representatives": 40, "num_classes": K, "accept": 0.5, **options}
    return make_buffer(RECORD, policy=policy, mesh=mesh, **sizes)


@functools.cache
def filled(shards, policy="reservoir", count=70, **options):
    """NumPy's copy of the state after `count` rows."""
    buffer = buffer_on(shards, policy, **options)
    insert, state = jax.jit(buffer.insert), buffer.init()
    for i in range(0, count, BATCH):
        ids = np.arange(i, i + BATCH, dtype=np.int32)
        ids[ids >= count] = -1
        rows = Rows(oracle.record_of(ids), (ids % K).astype(np.int32), ids, ids >= 0)
        state = insert(state, rows, jax.random.key(i))
    return jax.device_get(state)


def state_of(shards, policy="reservoir", **options):
    state, mesh = filled(shards, policy, **options), mesh_lib.make_mesh(jax.devices()[: shards or 1])
    return mesh_lib.split_rows(mesh, state) if shards else jax.tree.map(jnp.array, state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def files_in(path: pathlib.Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_row_comes_back_on_any_number_of_devices(policy, tmp_path):
    """On as many devices bit for bit; on others as `reshard` says, whose laws test_checkpoint_reshard.py has."""
    for old, count, others in ((8, 70, (1, 4, 8)), (2, 25, (8,))):
        at = tmp_path / f"{old}"
        buffer_on(old, policy).save(state_of(old, policy, count=count), at)
        stored = filled(old, policy, count=count)
        for new in others:
            found = jax.device_get(buffer_on(new, policy).load(at))
            ids = found.id[found.id >= 0]
            assert sorted(ids) == sorted(stored.id[stored.id >= 0])
            oracle.assert_whole(
                jax.tree.map(lambda x, f=found: x[f.id >= 0], found.record), found.label[found.id >= 0], ids, K
            )
            moved = reshard(stored, policy=policy, capacity=CAPACITY, num_classes=K, old=old, new=new)
            assert_same(found, stored if old == new else moved)


def test_a_draw_and_an_insert_go_on_as_if_nothing_had_been(tmp_path):
    buffer, state = buffer_on(4, "class_balanced"), state_of(4, "class_balanced")
    buffer.save(state, tmp_path / "saved")
    loaded = buffer.load(tmp_path / "saved")
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    draw = jax.jit(buffer.draw)
    assert_same(draw(loaded, jax.random.key(3)), draw(state, jax.random.key(3)))
    ids = np.arange(100, 100 + BATCH, dtype=np.int32)
    rows = Rows(oracle.record_of(ids), (ids % K).astype(np.int32), ids)
    assert_same(*(buffer.insert_and_draw(s, rows, jax.random.key(5)) for s in (loaded, state)))


def test_memories_of_every_kind(tmp_path):
    for i, (options, count) in enumerate(
        [({"memory": "replicated"}, 1), ({"memory": "independent"}, 2), ({"repeats": "distinct", "num_ids": 99}, 2)]
    ):
        at = tmp_path / str(i)
        two, state = buffer_on(2, **options), filled(2, **options)
        two.save(state_of(2, **options), at)
        assert len(list(at.glob("shard-*"))) == count  # what all devices hold is written once
        assert_same(two.load(at), state)
        four = buffer_on(4, **options)
        if options.get("memory") == "independent":
            with pytest.raises(UserError, match="devices: 4 is not allowed"):
                four.load(at)
            continue
        found = jax.device_get(four.load(at))
        held = {"memory": "sharded", **options}["memory"]
        moved = reshard(state, policy="reservoir", capacity=CAPACITY, num_classes=K, old=2, new=4, memory=held)
        assert_same(found, moved)
    alone = buffer_on(0)  # without a mesh
    alone.save(state_of(0), tmp_path / "alone")
    assert_same(alone.load(tmp_path / "alone"), filled(0))
    assert_same(buffer_on(1).load(tmp_path / "alone"), filled(0))


@pytest.mark.parametrize("path", [False, True])
def test_from_one_tier_into_the_other(path, tmp_path):
    buffer_on(4).save(state_of(4), tmp_path / "device")
    for shards in (4, 2):
        files = {"path": str(tmp_path / f"rows-{shards}")} if path else {}
        host = make_buffer(
            RECORD,
            capacity=CAPACITY,
            representatives=40,
            mesh=mesh_lib.make_mesh(jax.devices()[:shards]),
            tier="host",
            **files,
        )
        state = host.load(tmp_path / "device")
        assert state.record == {}
        host.save(state, tmp_path / f"host-{shards}")
        again = buffer_on(4).load(tmp_path / f"host-{shards}")
        if shards == 4:
            assert files_in(tmp_path / "host-4") == files_in(tmp_path / "device")
        assert sorted(np.asarray(again.id)) == sorted(filled(4).id)
        written = np.flatnonzero(np.asarray(again.id) >= 0)
        record = jax.tree.map(lambda x, at=written: np.asarray(x)[at], again.record)
        oracle.assert_whole(record, np.asarray(again.label)[written], np.asarray(again.id)[written], K)


@pytest.mark.parametrize("kind", ["auto", "explicit", "several"])
def test_on_meshes_with_other_axes_each_row_is_saved_once(kind, tmp_path):
    buffer_on(4).save(state_of(4), tmp_path / "one")
    devices, axis = np.asarray(jax.devices()[:8]), "data"
    if kind == "explicit":
        mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2, devices=devices)
    elif kind == "auto":
        mesh = jax.sharding.Mesh(devices.reshape(2, 4), ("model", "data"))
    else:
        mesh, axis = jax.sharding.Mesh(devices.reshape(2, 2, 2), ("replica", "model", "fsdp")), ("replica", "fsdp")
    buffer = make_buffer(RECORD, capacity=CAPACITY, representatives=40, mesh=mesh, axis=axis)
    state = buffer.load(tmp_path / "one")
    assert len(state.id.addressable_shards) == 8
    assert_same(state, filled(4))
    buffer.save(state, tmp_path / "other")
    assert files_in(tmp_path / "other") == files_in(tmp_path / "one")
    ids = np.asarray(state.id)
    np.testing.assert_array_equal(buffer.select(state, lambda record, label, ident: ident >= 9).id, ids[ids >= 9])


def test_every_type_is_read_by_numpy_alone(tmp_path):
    n = 6
    rng = np.random.default_rng(0)
    record = {
        "half": rng.normal(size=(n, 2)).astype(np.float16),
        "brain": rng.normal(size=(n, 2)).astype(ml_dtypes.bfloat16),
        "small": rng.normal(size=n).astype(ml_dtypes.float8_e4m3fn),
        "wave": (rng.normal(size=(n, 3)) + 1j * rng.normal(size=(n, 3))).astype(np.complex64),
        "tone": (rng.normal(size=n) + 1j).astype(np.complex64),
        "four": rng.integers(-8, 8, (n, 3)).astype(ml_dtypes.int4),
        "flag": rng.random(n) < 0.5,
        "a/b": [rng.normal(size=n).astype(np.float32)],
        "a_b": [rng.normal(size=n).astype(np.float32)],
        "key": jax.random.split(jax.random.key(1), n),
    }
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), record)
    buffer = make_buffer(one, capacity=8, representatives=2)
    ids = np.arange(n, dtype=np.int32)
    state = buffer.insert(buffer.init(), Rows(jax.tree.map(jnp.asarray, record), id=ids), jax.random.key(0))
    buffer.save(state, tmp_path / "saved")
    assert_same(buffer.load(tmp_path / "saved"), state)
    holds = json.loads((tmp_path / "saved" / "manifest.json").read_text())["holds"]

    def read(name):
        return np.load(tmp_path / "saved" / "shard-00000" / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    assert list(read("id")) == [*range(n), -1, -1]
    for name in ("half", "wave", "tone", "flag"):
        stored = read(f"record.{name}")
        assert stored.dtype == record[name].dtype
        np.testing.assert_array_equal(stored[:n], record[name])
        assert " as " not in holds[f"record.{name}"]
    for name, bits in (("brain", "uint16 [2]"), ("small", "uint8 []")):
        np.testing.assert_array_equal(read(f"record.{name}")[:n].view(record[name].dtype), record[name])
        assert holds[f"record.{name}"].endswith(f" as {bits}")
    np.testing.assert_array_equal(read("record.four")[:n], record["four"].astype(np.int8))
    np.testing.assert_array_equal(read("record.key")[:n], jax.random.key_data(record["key"]))
    for name in ("a/b", "a_b"):  # their files would have one name
        (at,) = (i for i, x in enumerate(sorted(record)) if x == name)
        np.testing.assert_array_equal(read(f"record.a_b.0-{at}")[:n], record[name][0])


def test_damage_is_refused_by_one_line_that_names_the_file(tmp_path):
    buffer, at = buffer_on(2), tmp_path / "saved"
    buffer.save(state_of(2), at)
    whole = files_in(at)
    assert len(whole) == 1 + 2 * len(jax.tree.leaves(filled(2)))
    for name, content in whole.items():
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (flipped, content[:-1], None):
            if damaged is None:
                (at / name).unlink()
            else:
                (at / name).write_bytes(damaged)
            with pytest.raises(UserError, match=r"damaged|holds no saved buffer") as error:
                buffer.load(at)
            assert (name in str(error.value) or damaged is None) and "\n" not in str(error.value)
        (at / name).write_bytes(content)
    assert_same(buffer.load(at), filled(2))


@pytest.mark.parametrize(
    "change, field",
    [
        ({"policy": "fifo"}, "its policy is reservoir, that of this buffer fifo"),
        ({"capacity": 44}, "its capacity is 43"),
        ({"memory": "replicated"}, "its memory is sharded"),
        ({"repeats": "distinct", "num_ids": 9}, "its num_ids is None"),
        ({"policy": "class_balanced"}, "its policy"),
    ],
)
def test_another_memory_is_refused(change, field, tmp_path):
    buffer_on(2).save(state_of(2), tmp_path / "saved")
    with pytest.raises(UserError, match=field):
        buffer_on(2, **change).load(tmp_path / "saved")


@pytest.mark.parametrize(
    "change, field",
    [
        (
            {"image": jax.ShapeDtypeStruct((3, 2), np.int8)},
            r"its record.image is uint8 \[3, 2\], that of this buffer int8",
        ),
        ({"image": jax.ShapeDtypeStruct((2, 3), np.uint8)}, r"that of this buffer uint8 \[2, 3\]"),
        ({"extra": jax.ShapeDtypeStruct((), np.uint8)}, "its record.extra is None"),
    ],
)
def test_another_record_is_refused(change, field, tmp_path):
    buffer_on(2).save(state_of(2), tmp_path / "saved")
    other = make_buffer(
        RECORD | change, capacity=CAPACITY, representatives=2, mesh=mesh_lib.make_mesh(jax.devices()[:2])
    )
    with pytest.raises(UserError, match=field):
        other.load(tmp_path / "saved")


def test_a_folder_is_replaced_only_if_it_is_a_saved_buffer_and_that_is_wanted(tmp_path):
    buffer, state, at = buffer_on(2), state_of(2), tmp_path / "saved"
    with pytest.raises(UserError, match="holds no saved buffer"):
        buffer.load(at)
    at.mkdir()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not a saved buffer alone"):
            buffer.save(state, at, overwrite=overwrite)
    at.rmdir()
    buffer.save(state, at)
    with pytest.raises(UserError, match="overwrite=True"):
        buffer.save(state, at)
    buffer.save(buffer.init(), at, overwrite=True)
    assert not (np.asarray(buffer.load(at).id) >= 0).any()
    (at / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a saved buffer alone"):
        buffer.save(state, at, overwrite=True)
    assert (at / "thesis.txt").read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [at]  # nothing is left beside it


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    buffer, at = buffer_on(2), tmp_path / "saved"
    buffer.save(state_of(2), at)
    whole, write, calls = files_in(at), folder.write, itertools.count()

    def full(*args):
        if next(calls) == 5:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(folder, "write", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        buffer.save(buffer.init(), at, overwrite=True)
    with pytest.raises(UserError, match="holds no saved buffer"):
        buffer.load(tmp_path / "saved.saving")
    assert files_in(at) == whole
    buffer.save(buffer.init(), at, overwrite=True)  # what the first one left is no hindrance
    assert sorted(tmp_path.iterdir()) == [at] and files_in(at) != whole
    shutil.copytree(at, tmp_path / "saved.replaced")  # as if killed before the last one was removed
    buffer.save(state_of(2), at, overwrite=True)
    assert sorted(tmp_path.iterdir()) == [at] and files_in(at) == whole
    at.rename(tmp_path / "saved.replaced")  # as if killed between the two renames
    with pytest.raises(UserError, match=r"saved.replaced is what an interrupted save has left: rename it"):
        buffer.load(at)
