"""The cache of compiled programs: found again, and whatever becomes of its files, no more than a warning."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import filelock
import pytest

from tests import whole

PROGRAMS = 3
SCRIPT = f"""
import json, sys
import jax, jax.numpy as jnp
from jaxcl import compilation
compilation.use(sys.argv[1] or None)
for i in range({PROGRAMS}):
    found = jax.jit(lambda x: jnp.sin(x) * (i + 1), donate_argnums=0)(jnp.ones(4))
value = float(found.sum())
print(json.dumps({{**compilation.spent(), "value": value}}))
"""
WRITING = """
import errno, os, pathlib
from etils.epath import abstract_path
def half(self, data):
    if not self.name.endswith("-cache"):
        return pathlib.Path(self).open("wb").write(data)
    with open(self, "wb") as file:
        file.write(data[: len(data) // 2])
    {}
pathlib.Path.write_bytes = abstract_path.Path.write_bytes = half  # JAX takes the latter where it is installed
"""
KILLED_WHILE_WRITING = WRITING.format("os._exit(9)")
DISK_FULL = WRITING.format("raise OSError(errno.ENOSPC, 'No space left on device')")


def run(folder, before="", cwd=whole.REPO):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "XLA_FLAGS"))}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(cwd)}
    done = subprocess.run(
        [sys.executable, "-c", before + SCRIPT, str(folder)], capture_output=True, text=True, env=environment, cwd=cwd
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr.splitlines()


def entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*-cache"))


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "in" / "a folder"
    status, found, errors = run(folder)
    assert (status, errors) == (0, []) and found["cache_hits"] == 0 and found["requests"] >= PROGRAMS
    assert found["compile_seconds"] > 0 and found["trace_seconds"] > 0
    assert len(entries(folder)) == found["requests"]
    return folder, found


@pytest.fixture
def cache(filled, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(filled[0], folder)
    return folder


def test_a_second_process_compiles_nothing(cache, filled):
    status, found, errors = run(cache)
    assert (status, errors) == (0, [])
    assert found["cache_hits"] == found["requests"] == filled[1]["requests"] and found["value"] == filled[1]["value"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "changed", "foreign"])
def test_a_damaged_entry_is_compiled_anew_with_one_warning_and_replaced(cache, filled, damage):
    for path in entries(cache):
        whole_entry = path.read_bytes()
        middle = len(whole_entry) // 2
        path.write_bytes(
            {
                "truncated": whole_entry[:middle],
                "empty": b"",
                "changed": whole_entry[:middle] + bytes([whole_entry[middle] ^ 255]) + whole_entry[middle + 1 :],
                "foreign": b"someone else's" * 100,
            }[damage]
        )
    status, found, errors = run(cache)
    assert status == 0 and found["cache_hits"] == 0 and found["value"] == filled[1]["value"]
    assert len(errors) == 1 and "compiled programs in" in errors[0] and errors[0].endswith("the run goes on")
    status, found, errors = run(cache)
    assert (status, errors) == (0, []) and found["cache_hits"] == found["requests"]


def test_a_process_that_is_killed_as_it_writes_leaves_nothing_that_harms(tmp_path, filled):
    status, _, _ = run(tmp_path / "cache", before=KILLED_WHILE_WRITING)
    assert status == 9 and len(entries(tmp_path / "cache")) == 1 and not list(tmp_path.glob("cache/*-atime"))
    status, found, errors = run(tmp_path / "cache")
    assert (status, errors) == (0, []) and found["cache_hits"] == 0
    status, found, errors = run(tmp_path / "cache")
    assert (status, errors) == (0, []) and found["cache_hits"] == found["requests"]


def test_an_entry_without_its_stamp_does_not_keep_others_from_being_written(cache):
    [first, *_] = entries(cache)
    first.with_name(first.name.removesuffix("-cache") + "-atime").unlink()
    status, found, errors = run(cache)
    assert (status, errors) == (0, []) and found["cache_hits"] == found["requests"] - 1


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path, filled):
    (tmp_path / "file").write_text("")
    status, found, errors = run(tmp_path / "file" / "cache")
    assert status == 0 and found["value"] == filled[1]["value"]
    assert len(errors) == 1 and "compiled programs are not kept" in errors[0]


def test_a_full_disk_is_done_without(tmp_path, filled):
    status, found, errors = run(tmp_path, before=DISK_FULL)
    assert status == 0 and found["value"] == filled[1]["value"] and not entries(tmp_path)
    assert len(errors) == 1 and "No space left" in errors[0]


def test_a_folder_that_stays_locked_is_given_up_at_once(cache, filled):
    short = "from jaxcl import compilation\ncompilation.LOCK_SECONDS = 0.2\n"
    with filelock.FileLock(cache / ".lockfile"):
        status, found, errors = run(cache, before=short)
    assert status == 0 and found["value"] == filled[1]["value"] and found["requests"] == 0
    assert len(errors) == 1 and "compiled programs are not kept" in errors[0]


def test_without_a_folder_it_is_the_users(tmp_path):
    place = f"import os; os.environ['XDG_CACHE_HOME'] = {str(tmp_path)!r}\n"
    status, found, errors = run("", before=place)
    assert (status, errors) == (0, [])
    [folder] = tmp_path.glob("jaxcl/compiled/*")
    assert len(entries(folder)) == found["requests"] > 0


def test_off_keeps_nothing(tmp_path):
    status, found, errors = run("off", before=f"import os; os.environ['XDG_CACHE_HOME'] = {str(tmp_path)!r}\n")
    assert (status, errors) == (0, []) and found["requests"] == 0 and not list(tmp_path.iterdir())
