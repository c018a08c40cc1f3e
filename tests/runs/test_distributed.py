"""Several processes: the same run as one, and what becomes of it when one of them fails. Through the real entry point."""

import json
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest

from jaxcl import data
from jaxcl import mesh as mesh_lib
from jaxcl.errors import PEER_LOST, Preempted, UserError
from jaxcl.runs import control
from jaxcl.training.loop import train_and_evaluate
from tests import whole as runs

GONE = (PEER_LOST, -signal.SIGABRT)  # our watchdog or JAX's heartbeat, whichever is first


def train_all(folder, processes, devices, *more, **changes):
    """Runs to the end; the standard errors."""
    ends = [runs.wait(process) for process in runs.start_all(folder, processes, devices, *more, **changes)]
    assert [status for status, _ in ends] == [0] * processes, ends
    return [errors for _, errors in ends]


def assert_equal_to_rounding(one, other):
    """Parameters to rounding; what is discrete (every row of the buffer, steps, counts) exactly."""
    runs.assert_same_but_for_rounding(one, other, rtol=1e-4, atol=1e-5)
    steps = [[(line["step"], line["rows"], line["replayed"]) for line in runs.lines(x, "train")] for x in (one, other)]
    assert steps[0] == steps[1] and steps[0]


@pytest.mark.parametrize(("processes", "devices"), [(2, 4), pytest.param(4, 2, marks=pytest.mark.exhaustive)])
def test_several_processes_are_one_run(processes, devices, tmp_path):
    train_and_evaluate(runs.small(), tmp_path / "one", devices=jax.devices()[:8], progress=False)
    train_all(tmp_path / "several", processes, devices)
    assert_equal_to_rounding(tmp_path / "one", tmp_path / "several")
    one, several = (json.loads((tmp_path / x / "result.json").read_text()) for x in ("one", "several"))
    mesh = {"data": 8, "fsdp": 1, "model": 1}
    assert several["devices"] == {"count": 8, "mesh": mesh, "kind": "cpu", "platform": "cpu", "processes": processes}
    assert several["buffer"] == one["buffer"]
    np.testing.assert_allclose(several["accuracy_matrix"], one["accuracy_matrix"], atol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["device", "host"])
def test_one_process_goes_on_as_two_and_the_other_way_round(tier, tmp_path, monkeypatch):
    changes = {"checkpoint__every_steps": 4, "buffer__tier": tier}
    config = runs.small(**changes)
    runs.stop_at(monkeypatch, [9])
    with pytest.raises(RuntimeError, match="SIGTERM"):
        train_and_evaluate(config, tmp_path / "moved", devices=jax.devices()[:2], progress=False)
    _, arrays = runs.last(tmp_path / "moved")
    kept = np.sort(arrays["buffer.id"][arrays["buffer.id"] >= 0])

    processes = runs.start_all(tmp_path / "moved", 2, 2, **changes)
    before = len(runs.lines(tmp_path / "moved", "train"))
    runs.until(lambda: len(runs.lines(tmp_path / "moved", "train")) > before, *processes)
    processes[1].send_signal(signal.SIGTERM)  # to one of them: all save and stop
    ends = [runs.wait(process) for process in processes]
    assert [status for status, _ in ends] == [75, 75], ends
    assert "saved by 2 devices of 1 processes, now 4 of 2: the buffer is divided anew" in ends[0][1]
    progress, arrays = runs.last(tmp_path / "moved")
    assert progress["devices"] == 4 and progress["processes"] == 2 and progress["step"] > 9
    later = arrays["buffer.id"][arrays["buffer.id"] >= 0]
    assert len(later) >= len(kept) and len(set(later)) == len(later)
    if tier == "device":
        images = arrays["buffer.record.image"]
    else:
        images = np.concatenate(list(runs.host_rows(tmp_path / "moved").values()))
    source, _ = data.open_source("digits", None)
    images = images.reshape(-1, *source.image_shape)[arrays["buffer.id"] >= 0]
    np.testing.assert_array_equal(images, source.read(later))

    result = train_and_evaluate(config, tmp_path / "moved", devices=jax.devices()[:8], progress=False)
    assert result["devices"]["count"] == 8 and result["buffer"]["rows"] == 40


@pytest.mark.slow
def test_when_one_process_is_killed_the_other_ends_and_the_run_continues_exactly(tmp_path):
    """First the one, then, of the continued run, the other, which is the coordinator."""
    changes, often = {"epochs": 2}, {"checkpoint__every_steps": 5}
    train_all(tmp_path / "whole", 2, 2, **changes)
    for victim in (1, 0):
        before = runs.saved_step(tmp_path / "killed" / "checkpoints")
        limits = "--heartbeat_seconds=10", "--stall_seconds=30"
        processes = runs.start_all(tmp_path / "killed", 2, 2, *limits, **changes, **often)
        runs.until(lambda: runs.saved_step(tmp_path / "killed" / "checkpoints") > before, *processes)  # noqa: B023
        processes[victim].kill()
        runs.wait(processes[victim])
        status, errors = runs.wait(processes[1 - victim])
        assert status in GONE, errors
        # JAX's runtime or its collectives, where they are first, abort with words of their own, and absl tells where.
        said = "another process has died" if status == PEER_LOST else "Fatal Python error: Aborted"
        assert said in errors, errors
    train_all(tmp_path / "killed", 2, 2, **changes)
    assert len(runs.lines(tmp_path / "killed", "resume")) == 2
    runs.assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("victim", [1, 0])
def test_a_process_that_is_killed_before_all_have_met_leaves_none_waiting(victim, tmp_path):
    """Process 0 is the coordinator, which the other then never reaches."""
    processes = runs.start_all(tmp_path / "run", 2, 2, "--start_seconds=5")
    processes[victim].kill()
    runs.wait(processes[victim])
    status, errors = runs.wait(processes[1 - victim])
    assert status == PEER_LOST, errors
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert said == errors.splitlines()[-1:]
    assert f"process {1 - victim} of 2: not all processes were started and met within 5 s" in said[0]


def test_a_process_that_is_told_to_stop_while_it_waits_for_the_others_ends_at_once(tmp_path):
    [process, other] = runs.start_all(tmp_path / "run", 2, 2, "--start_seconds=300")
    other.kill()
    runs.wait(other)
    (address,) = [word.partition("=")[2] for word in process.args if word.startswith("--coordinator=")]
    runs.until(lambda: _listens(address), process)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    status, errors = runs.wait(process)
    assert time.monotonic() - begin < 100
    assert status == Preempted.status and errors.splitlines()[-1].startswith("error: SIGTERM: told to stop"), errors


def _listens(address):
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_a_process_that_never_begins_to_train_ends_the_others(tmp_path):
    """It has met them, lives, gives its heartbeats, and does not come to where the run is opened."""
    ready = textwrap.dedent(
        """
        import sys, time
        from jaxcl import mesh
        mesh.use_fake_devices(1)
        mesh.join_processes(sys.argv[1], 2, int(sys.argv[2]), start_seconds=200)
        print("met", flush=True)
        if sys.argv[2] == "1":
            time.sleep(300)
        mesh.from_first(lambda: 1, start_seconds=3)
        """
    )
    address = runs.free_address()
    line = [sys.executable, "-c", ready, address]
    options = {"cwd": runs.REPO, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*line, str(i)], **options) for i in (0, 1)]
    status, errors = runs.wait(processes[0])
    processes[1].kill()
    assert runs.wait(processes[1])[0] == -signal.SIGKILL
    assert status == PEER_LOST and "process 0 of 2: not all processes were ready to train within 3 s" in errors, errors


@pytest.mark.slow
def test_a_slow_process_is_waited_for_and_a_stopped_one_is_not(tmp_path):
    changes = {"epochs": 12}
    processes = runs.start_all(tmp_path / "run", 2, 2, "--stall_seconds=30", **changes)
    logged = [0]

    def more():
        now = len(runs.lines(tmp_path / "run", "train"))
        return now > logged[0]

    runs.until(more, *processes)
    processes[1].send_signal(signal.SIGSTOP)
    threading.Event().wait(3)
    processes[1].send_signal(signal.SIGCONT)
    logged[0] = len(runs.lines(tmp_path / "run", "train"))
    runs.until(more, *processes)
    assert all(process.poll() is None for process in processes), "ended before it was stopped for good: make it longer"
    processes[1].send_signal(signal.SIGSTOP)
    status, errors = runs.wait(processes[0])
    assert status == PEER_LOST, errors
    assert "process 0 of 2: nothing was finished for 30 s after step" in errors.splitlines()[-1]
    processes[1].kill()
    runs.wait(processes[1])


@pytest.mark.slow
def test_a_mistake_ends_all_processes_with_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")  # of somebody else; process 0 alone looks
    for status, errors in list(map(runs.wait, runs.start_all(tmp_path, 2, 2))):
        assert status == 2, errors
        (line,) = (line for line in errors.splitlines() if "Gloo" not in line)
        assert line.startswith("error: workdir: ") and "holds config.json and no run" in line


@pytest.mark.slow
def test_a_process_that_hangs_before_the_first_step_ends_the_others(tmp_path):
    processes = runs.start_all(tmp_path / "run", 2, 2, "--start_seconds=30")
    runs.until(lambda: list((tmp_path / "run").glob("events.*")), *processes)  # the run is open; programs are compiled
    processes[1].send_signal(signal.SIGSTOP)
    status, errors = runs.wait(processes[0])
    processes[1].kill()
    runs.wait(processes[1])
    assert status == PEER_LOST, errors
    assert "process 0 of 2: nothing was finished for 30 s after the start" in errors.splitlines()[-1]


def test_the_watchdog_ends_a_process_that_hangs_and_no_other(monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(mesh_lib.os, "_exit", lambda status: ended.set())
    before = threading.active_count()
    alone = control.Watchdog(0.5, 0.5)
    assert threading.active_count() == before
    alone.close()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for start, stall, what in ((0.5, None, "the start"), (None, 0.5, "step 7"), (0, 0.5, "step 7")):
        off, watching = control.Watchdog(None, 0), control.Watchdog(start, stall)
        if stall:
            watching.done("step 7")
        assert ended.wait(60)
        off.close(), watching.close()
        assert f"process 0 of 2: nothing was finished for 0.5 s after {what}" in capsys.readouterr().err
        ended.clear()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", socket.gethostname()])
def test_a_port_in_use_is_refused(host):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        address = f"{host}:{other.getsockname()[1]}"
        with pytest.raises(
            UserError, match=f"--coordinator: process 0 cannot listen at {address}: Address already in use"
        ):
            mesh_lib._listening_address(address)


def test_process_0_listens_where_it_is_told():
    port = runs.free_address().split(":")[1]
    for host in ("127.0.0.1", "localhost"):
        assert mesh_lib._listening_address(f"{host}:{port}") == f"{host}:{port}"
    assert mesh_lib._listening_address(f"some-name:{port}") is None  # JAX's default: every address
    with pytest.raises(UserError, match="Cannot assign requested address; give an address and a free port"):
        mesh_lib._listening_address(f"192.0.2.1:{port}")  # of RFC 5737: nobody's


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"coordinator": "localhost:1"}, "--num_processes: missing"),
        ({"num_processes": 2, "process_id": 0}, "--coordinator: missing"),
        (
            {"coordinator": "localhost:1", "num_processes": 2, "process_id": 2},
            "--process_id: 2 .* 0 to num_processes - 1 = 1",
        ),
        ({"heartbeat_seconds": 0}, "--heartbeat_seconds: 0"),
        *[
            (
                {"coordinator": x, "num_processes": 2, "process_id": 0},
                "--coordinator: .* is not allowed, give HOST:PORT",
            )
            for x in ("localhost", ":1", "localhost:0", "localhost:65536", "localhost:x", "local host:1", "")
        ],
    ],
    ids=str,
)
def test_mistakes_before_anything_is_joined(arguments, words):
    with pytest.raises(UserError, match=words):
        mesh_lib.join_processes(**arguments)
