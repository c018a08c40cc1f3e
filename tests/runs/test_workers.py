"""Worker processes: the same batches, the same errors, an exact resume, and nothing that outlives the run."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxcl.data import array_source, open_source, train_batches
from jaxcl.data.sources import digits
from jaxcl.errors import DataError
from jaxcl.training.loop import train_and_evaluate
from tests import whole as runs
from tests.runs.test_damaged_data import flip

# Its shared memory has names of its own: tests beside this one share memory too. The workers import this script, so theirs has.
READ = """
import multiprocessing.shared_memory, os, sys
multiprocessing.shared_memory._SHM_NAME_PREFIX = os.environ["SEGMENTS"]
from jaxcl.data import open_source, train_batches

if __name__ == "__main__":
    source = open_source("digits", sys.argv[1], cache_bytes=0)[0]
    batches = iter(train_batches(source, source.labels, batch_size=8, epochs=100, seed=(1,), num_workers=2))
    next(batches)
    print("reading", flush=True)
    sys.stdin.readline()
    os._exit(0) if sys.argv[2] == "exit" else None
"""


def loader(num_workers, **options):
    rng = np.random.default_rng(0)
    source = array_source(rng.integers(0, 256, (44, 3, 3, 1), np.uint8), np.arange(44) % 4, list("abcd"))
    options = {"batch_size": 8, "epochs": 2, "seed": (1, 2)} | options
    return train_batches(source, np.arange(40), num_workers=num_workers, memory=[40, 41, 42, 43], part=2, **options)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


def children(pid):
    """The processes below `pid` that read, whatever has become of it."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()[1:]]
    return [int(row[0]) for row in rows if int(row[1]) == pid and "multiprocessing.spawn" in row[2]]


def segments(name):
    """The shared memory whose names begin with this."""
    return list(pathlib.Path("/dev/shm").glob(f"{name}*"))


def alive(pids):
    return [pid for pid in pids if pathlib.Path(f"/proc/{pid}").exists()]


def ended(pids, seconds=20.0):
    end = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.1)
    return not alive(pids)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_are_the_same_and_resume_exactly_with_any_number_of_workers(num_workers):
    plain, before = loader(0), set(children(os.getpid()))
    iterator = iter(loader(num_workers))
    for t in range(4):
        assert iterator.get_state() == {"next_index": t}
        assert_same(next(iterator), plain[t])
    own = set(children(os.getpid())) - before
    assert len(own) == num_workers
    other = iter(plain)
    other.set_state(iterator.get_state())  # with threads from here on
    assert_same(next(other), plain[4])
    iterator.set_state({"next_index": 7})
    for t in range(7, len(plain)):
        assert_same(next(iterator), plain[t])
    with pytest.raises(StopIteration):
        next(iterator)
    assert ended(own | (set(children(os.getpid())) - before))


def test_a_damaged_record_is_named_and_a_dead_worker_too(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digits.prepare(str(tmp_path))
    open_source("tfds:digits", str(tmp_path), image_size=8)  # keeps the labels
    (file,) = tmp_path.rglob("*train*array_record*")
    whole = file.read_bytes()
    flip(file, 0.5)

    def batches():
        train = open_source("tfds:digits", str(tmp_path), image_size=8)[0]
        return iter(train_batches(train, np.arange(len(train)), batch_size=64, epochs=50, seed=(0,), num_workers=1))

    with pytest.raises(DataError, match=r"^data: record \d+ of tfds:digits, split train in ") as error:
        list(batches())
    assert "\n" not in str(error.value)
    file.unlink()
    file.write_bytes(whole)
    before = children(os.getpid())
    iterator = batches()
    next(iterator)
    (worker,) = set(children(os.getpid())) - set(before)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # are the parent's
        os.kill(worker, number)
    next(iterator)
    assert alive([worker])
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(DataError, match=r"^data\.workers: a worker process has died, of too little memory\? \(.*-9"):
        for _ in iterator:
            pass


@pytest.mark.parametrize("how", ["kill", "exit", "return"])
def test_nothing_outlives_the_process_that_reads(how, tmp_path):
    script = tmp_path / "read.py"
    script.write_text(READ)
    name = f"w{os.getpid():x}"
    command = [sys.executable, str(script), str(tmp_path / "data"), how]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "XDG_CACHE_HOME": str(tmp_path), "SEGMENTS": f"/{name}"}
    reader = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert reader.stdout.readline() == "reading\n"
    workers = children(reader.pid)
    assert len(workers) == 2 and segments(name)
    if how == "kill":
        reader.kill()
    reader.communicate("\n")
    assert ended(workers)
    end = time.monotonic() + 20
    while segments(name) and time.monotonic() < end:
        time.sleep(0.1)
    assert not segments(name)


@pytest.mark.slow
def test_a_run_with_workers_is_the_run_without(tmp_path):
    for name, workers in (("threads", 0), ("workers", 2)):
        config = runs.small(seed=3, data__workers=workers)
        train_and_evaluate(config, tmp_path / name, devices=jax.devices()[:2], progress=False)
    runs.assert_same_run(tmp_path / "threads", tmp_path / "workers")
