"""What is not ours, or not of this run: never deleted, replaced or followed, and said in one line."""

import contextlib
import json
import logging
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcl
from jaxcl.buffer.host.rows import MARK, allocate
from jaxcl.errors import UserError
from jaxcl.runs import checkpoint, workdir
from jaxcl.runs.session import open_session
from tests.folders import begin, claim, config, contents, finish

OTHERS = {  # folders of someone else
    "a checkpoint": {"checkpoints/best/m.pt": "weights"},
    "a log": {"metrics.jsonl": '{"loss": 1.0}\n'},
    "events": {"events.out.tfevents.1.host": "events"},
    "a config": {"config.json": '{"name": "bert", "seed": 1, "checkpoint": "best"}'},
    "a result": {"result.json": '{"checksum": 1}'},
    "notes": {"notes.txt": "mine"},
}
OWN = checkpoint.name_of(1, False, 0)  # the checkpoint of `begin`


def put(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def save(folder, name):
    checkpoints = checkpoint.Checkpoints(folder, 1, workdir.resolved(config()))
    checkpoints.save(name, {"w": jnp.arange(3.0)}, {})
    checkpoints.close()


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "jaxcl"]


def refused(folder, words, **options):
    """One line, and nothing in the folder changes."""
    before = contents(folder)
    with pytest.raises(UserError, match=f"^workdir: .*{words}") as error:
        claim(folder, **options)
    assert "\n" not in str(error.value) and contents(folder) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("files", OTHERS.values(), ids=OTHERS)
def test_a_folder_of_someone_else_is_refused(files, overwrite, tmp_path):
    put(tmp_path, files)
    refused(tmp_path, "holds .* and no run; give a new or an empty folder", overwrite=overwrite)
    for look in (workdir.finished, workdir.standing):
        with pytest.raises(UserError, match="and no run"):
            look(tmp_path, config())


def test_an_empty_folder_is_marked(tmp_path):
    put(tmp_path, {".lock": "of another tool", ".hidden/x": "y"})
    assert claim(tmp_path) == workdir.Claim(None, None)
    assert contents(tmp_path).items() >= {".lock": b"of another tool", ".hidden/x": b"y"}.items()
    assert (tmp_path / ".jaxcl").read_text() == f"a run of jaxcl {jaxcl.__version__}\n"


def test_a_run_from_before_there_were_marks_goes_on(tmp_path):
    (begin(tmp_path) / workdir.MARK).unlink()
    assert claim(tmp_path).found["name"] == OWN
    assert (tmp_path / workdir.MARK).exists()


def test_a_folder_of_the_first_version_is_refused_by_its_name(tmp_path):
    """It left no mark, and no version in config.json."""
    fields = {"every_steps": 0, "every_seconds": 600.0, "keep": 2}
    put(
        tmp_path,
        {".lock": "", "metrics.jsonl": "", "config.json": json.dumps({"name": "digits", "checkpoint": fields})},
    )
    for overwrite in (False, True):
        refused(tmp_path, "was written by jaxcl 0.1.0; this is .*; continue it with 0.1.0 or give", overwrite=overwrite)


@pytest.mark.parametrize("kind", ["copy", "link", "file"])
def test_a_checkpoint_is_written_where_something_else_has_its_name(kind, tmp_path, caplog):
    folder, name = begin(tmp_path) / "checkpoints", checkpoint.name_of(2, False, 0)
    if kind == "copy":
        shutil.copytree(folder / OWN, folder / name)
    elif kind == "link":
        (folder / name).symlink_to(OWN)
    else:
        (folder / name).write_text("theirs")
    (folder / f"{name}.foreign").write_text("from the last time")
    theirs = contents(folder / name) if kind == "copy" else (folder / name).read_bytes() if kind == "file" else None
    with caplog.at_level(logging.WARNING, "jaxcl"):
        save(folder, name)
    (line,) = said(caplog)
    assert line.endswith(f"{name}: not of this run, but named as the checkpoint to be saved: renamed {name}.foreign1")
    aside = folder / f"{name}.foreign1"
    if kind == "link":
        assert aside.is_symlink() and os.readlink(aside) == OWN
    else:
        assert (contents(aside) if kind == "copy" else aside.read_bytes()) == theirs
    assert (folder / f"{name}.foreign").read_text() == "from the last time"
    assert checkpoint.newest(folder)["name"] == name and aside.name in said(caplog)[-1]


def test_files_of_rows_are_made_anew_and_those_of_someone_else_refused(tmp_path):
    row, names = np.dtype(np.int32), [tmp_path / f"shard-{device:05d}.rows" for device in (0, 1)]
    (tmp_path / "shard-00007.rows").write_text("of another device")
    for _ in range(2):  # as if the first had been killed
        stored = allocate([0, 1], 5, row, str(tmp_path))
        assert [len(rows) for rows in stored] == [5, 5] and not np.concatenate(stored).any()
        for rows in stored:
            rows[:] = -1
            rows.flush()
        assert [name.read_bytes() for name in names] == [b"\xff" * 20 + MARK] * 2
    names[1].write_bytes(b"")  # killed as it was made
    assert not allocate([1], 5, row, str(tmp_path))[0].any()
    names[1].unlink()
    for make in (lambda: names[1].write_bytes(b"x" * 100), lambda: names[1].symlink_to(names[0]), names[1].mkdir):
        make()
        before = contents(tmp_path)
        with pytest.raises(UserError, match=rf"^buffer.path: {names[1]} is not a file of rows of jaxcl; remove it"):
            allocate([0, 1], 5, row, str(tmp_path))
        assert contents(tmp_path) == before
        if not names[1].is_dir():
            names[1].unlink()


@pytest.fixture
def mixed(tmp_path):
    """A run among things that are not of it, and these."""
    folder = begin(tmp_path / "run")
    own = contents(folder).keys()
    put(folder, OTHERS["a checkpoint"] | OTHERS["events"] | OTHERS["notes"] | {"checkpoints/list.txt": "x"})
    linked = checkpoint.name_of(5, False, 0)
    save(tmp_path / "outside", linked)
    (folder / "checkpoints" / linked).symlink_to(tmp_path / "outside" / linked)
    for copy in ("before", checkpoint.name_of(4, True, 7), f"{OWN}.old"):
        shutil.copytree(folder / "checkpoints" / OWN, folder / "checkpoints" / copy)
    shutil.copytree(tmp_path / "outside", folder / "copies")
    theirs = {name: x for name, x in contents(folder).items() if name not in own}
    assert len(theirs) > 30
    return folder, theirs, contents(tmp_path / "outside")


def test_what_is_not_of_the_run_is_left_alone_and_said_once(mixed, caplog):
    folder, theirs, outside = mixed
    with caplog.at_level(logging.WARNING, "jaxcl"):
        assert claim(folder).found["name"] == OWN
    (line,) = said(caplog)
    assert line.startswith(f"{folder}/checkpoints: not of this run and left alone: list.txt, best, before, ...")
    for task in (2, 3):  # each removes what is older, of its own
        save(folder / "checkpoints", checkpoint.name_of(task, False, 0))
    after = contents(folder)
    assert after.items() >= theirs.items() and contents(folder.parent / "outside") == outside
    assert f"checkpoints/{OWN}" not in after and f"checkpoints/{checkpoint.name_of(3, False, 0)}" in after


def test_to_overwrite_removes_the_run_and_nothing_else(mixed):
    folder, theirs, outside = mixed
    put(folder, {"metrics.jsonl.corrupt": "", f"checkpoints/{checkpoint.name_of(9, False, 0)}/torn": ""})
    assert claim(folder, overwrite=True, seed=1) == workdir.Claim(None, None)
    left = {name: x for name, x in contents(folder).items() if name not in ("checkpoints", ".jaxcl", "config.json")}
    assert left == theirs and contents(folder.parent / "outside") == outside


def test_to_overwrite_an_untouched_run_leaves_nothing_of_it(tmp_path):
    assert claim(finish(begin(tmp_path)), overwrite=True) == workdir.Claim(None, None)
    assert contents(tmp_path).keys() == {"checkpoints", ".jaxcl", "config.json"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl", "checkpoints"])
def test_a_link_is_not_followed(name, overwrite, tmp_path):
    folder, outside = finish(begin(tmp_path / "run")), tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    before = contents(tmp_path)
    refused(folder, f"{name} is a symbolic link; remove it", overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_mark_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "theirs").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / workdir.MARK).symlink_to(tmp_path / "theirs")
    refused(tmp_path / "run", "cannot be used")
    assert (tmp_path / "theirs").read_bytes() == b""


def test_checkpoints_that_are_gone_are_said_and_the_log_stays(tmp_path):
    shutil.rmtree(begin(tmp_path) / "checkpoints")
    refused(tmp_path, f"the checkpoints of the run, {tmp_path}/checkpoints, are gone; .* with --overwrite")
    assert claim(tmp_path, overwrite=True) == workdir.Claim(None, None)
    assert claim(tmp_path) == workdir.Claim(None, None)  # one that was killed before its first checkpoint


def test_a_finished_run_is_returned_without_writing_or_locking(tmp_path, mesh_of):
    folder = finish(begin(tmp_path))
    shutil.rmtree(folder / "checkpoints")
    times = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    with contextlib.ExitStack() as stack, workdir.locked(folder):
        assert open_session(stack, config(), folder, mesh_of(1), begin=0.0)["accuracy"] == 0.8125
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == times


@pytest.mark.skipif(os.getuid() != 0, reason="only root mounts")
def test_a_finished_run_is_returned_from_a_file_system_that_cannot_be_written(tmp_path, mesh_of):
    folder = finish(begin(tmp_path))
    if os.system(f"mount --bind {folder} {folder} 2>/dev/null && mount -o remount,ro,bind {folder}"):
        pytest.skip("no mounts here")
    try:
        with contextlib.ExitStack() as stack:
            assert open_session(stack, config(), folder, mesh_of(1), begin=0.0)["accuracy"] == 0.8125
            with pytest.raises(UserError, match=r"^workdir: .* cannot be used: .*Read-only"):
                open_session(stack, config(), folder, mesh_of(1), begin=0.0, overwrite=True)
    finally:
        os.system(f"umount {folder}")


def test_to_look_where_a_run_stands_changes_and_says_nothing(tmp_path, caplog):
    folder = finish(begin(tmp_path))
    put(folder, {"result.json": "{}", f"checkpoints/{checkpoint.name_of(2, False, 0)}/manifest.json": "{}"})
    before = contents(folder)
    with caplog.at_level(logging.WARNING, "jaxcl"):
        assert workdir.standing(folder, config()).found["name"] == OWN
    assert contents(folder) == before and not said(caplog)
    assert not workdir.standing(folder / "checkpoints" / "none", config()).found
    with caplog.at_level(logging.WARNING, "jaxcl"):
        claim(folder)
    assert ["set aside" in line or "made anew" in line for line in said(caplog)] == [True, True]
