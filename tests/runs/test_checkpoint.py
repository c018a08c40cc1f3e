"""Checkpoints: what is saved comes back bit for bit, whatever interrupted the run and however the files were damaged."""

import errno
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest

from jaxcl import mesh as mesh_lib
from jaxcl.errors import PeerLost, StorageError, UserError
from jaxcl.runs import checkpoint

A, B, C, D = (checkpoint.name_of(task, False, 0) for task in range(4))


@pytest.fixture
def state(mesh_of):
    mesh = mesh_of(8)
    rows = np.arange(8 * 5 * 3, dtype=np.uint8).reshape(40, 3)
    return {
        "whole": mesh_lib.replicate(
            mesh, {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "count": np.int32(7)}
        ),
        "rows": mesh_lib.shard_rows(mesh, rows),
        "none": None,
        "flags": mesh_lib.shard_rows(mesh, rows[:, 0] % 2 == 0),
    }


def save(folder, state, names=(A,), keep=2):
    checkpoints = checkpoint.Checkpoints(folder, keep)
    for i, name in enumerate(names):
        checkpoints.save(name, jax.tree.map(lambda x, i=i: x if x.dtype == bool else x + i, state), {"i": i})
    checkpoints.wait()
    checkpoints.close()


def restore(folder, target, **options):
    checkpoints = checkpoint.Checkpoints(folder, 1)
    try:
        return checkpoints.restore(checkpoint.newest(folder), target, **options)
    finally:
        checkpoints.close()


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_what_is_saved_comes_back_on_any_devices(state, devices, tmp_path, mesh_of, caplog):
    save(tmp_path, state)
    assert not caplog.records  # Orbax warns of each save without OCDBT
    mesh = mesh_of(devices)

    def wanted(x):
        sharding = mesh_lib.replicated(mesh) if x.sharding.is_fully_replicated else mesh_lib.by_rows(mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    target = jax.tree.map(wanted, state)
    found = restore(tmp_path, target)
    assert_equal(found, state)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
        assert x.sharding == y.sharding


def test_the_state_may_be_donated_while_it_is_being_saved(state, tmp_path):
    """`save` returns before the files are written; what the next steps do to the donated memory is not in them."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: ~x if x.dtype == bool else x + 1, tree), donate_argnums=0)
    before, target = jax.device_get(state), checkpoint.abstract(state)
    checkpoints = checkpoint.Checkpoints(tmp_path, 1)
    checkpoints.save(A, state, {})
    for _ in range(5):
        state = step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    checkpoints.close()
    assert_equal(restore(tmp_path, target), before)
    assert_equal(jax.device_get(state)["whole"]["count"], before["whole"]["count"] + np.int32(5))


def test_keeps_the_newest(state, tmp_path):
    save(tmp_path, state, (A, B, C, D), keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [B, C, D]
    assert checkpoint.newest(tmp_path)["run"] == {"i": 3}
    assert checkpoint.newest(tmp_path / "nothing") is None


def _largest(path: pathlib.Path) -> pathlib.Path:
    """The largest file of array data; Orbax names them by their place in the array, such as 0.0."""
    return max((p for p in path.rglob("*") if p.is_file() and p.name[0].isdigit()), key=lambda p: p.stat().st_size)


def _flip(path: pathlib.Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "truncated": lambda path: _largest(path).write_bytes(_largest(path).read_bytes()[:-1]),
    "one bit": lambda path: _flip(_largest(path)),
    "a file lost": lambda path: _largest(path).unlink(),
    "manifest truncated": lambda path: (path / "manifest.json").write_text("{"),
    "manifest of another": lambda path: (path / "manifest.json").write_text(
        (path / "manifest.json").read_text().replace('"i": 1', '"i": 2')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_one_is_reported_and_the_one_before_used(damage, state, tmp_path, caplog):
    save(tmp_path, state, (A, B))
    damage(tmp_path / B)
    with caplog.at_level(logging.WARNING, "jaxcl"):
        found = checkpoint.newest(tmp_path)
    assert found["name"] == A and found["run"] == {"i": 0}
    said = [record.getMessage() for record in caplog.records if record.name == "jaxcl"]
    assert len(said) == 1 and f"{B} is damaged" in said[0]
    assert_equal(restore(tmp_path, checkpoint.abstract(state)), state)
    assert (tmp_path / f"{B}.corrupt").is_dir()
    save(tmp_path, state, (B,))  # the name is free again
    assert checkpoint.newest(tmp_path)["name"] == B


def test_what_an_interrupted_save_left_is_removed(state, tmp_path):
    save(tmp_path, state, (A, B))
    (tmp_path / B / "manifest.json").unlink()
    shutil.copytree(
        tmp_path / B, tmp_path / checkpoint.name_of(0, True, 0)
    )  # an older one whose removal was interrupted
    shutil.copytree(tmp_path / A, tmp_path / f"{C}.orbax-checkpoint-tmp")
    (tmp_path / f"{C}.orbax-checkpoint-tmp" / "manifest.json").unlink()
    assert checkpoint.newest(tmp_path)["name"] == A
    assert [path.name for path in tmp_path.iterdir()] == [A]


def test_other_arrays_than_wanted(state, tmp_path):
    save(tmp_path, state)
    target = checkpoint.abstract(state)
    for change, words in (
        ({"rows": jax.ShapeDtypeStruct((48, 3), np.uint8)}, "rows in .* is uint8.40, 3., this run needs uint8.48, 3."),
        ({"flags": jax.ShapeDtypeStruct((40,), np.int8)}, "flags in .* is bool.40., this run needs int8.40."),
        ({"more": target["rows"]}, "lacks more"),
        ({"flags": None}, "has a needless flags"),
    ):
        with pytest.raises(UserError, match=words):
            restore(tmp_path, {**target, **change})


def test_a_failed_save_is_reported_at_the_next_check(state, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, state, (A,))
    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    monkeypatch.setattr(checkpoint.files, "write_json", full)
    checkpoints.save(B, state, {})
    with pytest.raises(StorageError, match=f"{B} cannot be written: the disk is full; those before it are kept"):
        checkpoints.wait()
    checkpoints.check()  # said once
    checkpoints.close()
    assert checkpoint.newest(tmp_path)["name"] == A


def test_a_save_that_fails_for_a_lost_process_is_not_a_full_disk(state, tmp_path, monkeypatch):
    """Of several processes: a collective that breaks, and a barrier's error as Orbax passes it on, with a type of its own."""
    broken = jax.errors.JaxRuntimeError("UNAVAILABLE: Failed to send RPC to coordination service.")

    def passed_on(*_, **__):
        raise TimeoutError("Timed out while waiting for async_write_complete barrier.") from broken

    def direct(*_, **__):
        raise broken

    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    orbax = checkpoints._orbax  # made by one process alone
    monkeypatch.setattr(checkpoint.jax, "process_count", lambda: 2)
    for failure in (direct, passed_on):
        monkeypatch.setattr(orbax, "save", failure)
        with pytest.raises(PeerLost, match=r"another process has died: .*those before it are kept"):
            checkpoints.save(A, state, {})
    checkpoints.close()


# Whole runs, interrupted in this process.


# Whole runs, killed: the real entry point in a process of its own.
