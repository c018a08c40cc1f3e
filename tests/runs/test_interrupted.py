"""Runs that are stopped, killed or run into a full disk or a loss that is not finite end as if they had not been."""

import dataclasses
import errno
import itertools
import json
import logging
import random
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from experiments.bench.interrupts import heeds
from jaxcl import data
from jaxcl.errors import Diverged, Preempted, RunError, UserError
from jaxcl.runs import checkpoint
from jaxcl.runs import session as session_lib
from jaxcl.runs import workdir as workdir_lib
from jaxcl.signals import STATUS
from jaxcl.strategies import STRATEGIES
from jaxcl.training import task
from jaxcl.training.loop import train_and_evaluate
from tests import whole as runs
from tests.runs.test_checkpoint import DAMAGE


def train(config, folder, devices=2, **options):
    return train_and_evaluate(config, folder, devices=jax.devices()[:devices], progress=False, **options)


# All state is one tree, saved whole: here one strategy of each kind of state and of what happens at a task's end.
KINDS = "agem", "bic", "der_pp", "dytox", "er", "from_scratch", "gdumb", "icarl", "ranpac", "sharp", "slca"


def kinds(strategy):
    return [] if strategy == "er" else [pytest.mark.slow] if strategy in KINDS else [pytest.mark.exhaustive]


@pytest.mark.parametrize("strategy", [pytest.param(s, marks=kinds(s)) for s in STRATEGIES])
def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(strategy, tmp_path, monkeypatch):
    """Stopped in the middle of a task and at the last step on its rows; er and gdumb also a step before, ten steps later (in
    gdumb's rehearsal) and before the end of the run."""
    config = runs.small(strategy=strategy)
    config.strategies.mir.replayed = 4  # of the 8 that a step of this config draws
    whole = train(config, tmp_path / "whole")
    lines = runs.lines(tmp_path / "whole", "train")
    end = next((a["step"] for a, b in itertools.pairwise(lines) if b["epoch"] < a["epoch"]), whole["steps"])
    more = [end - 1, end + 10, whole["steps"] - 2] if strategy in ("er", "gdumb") else []
    moments = sorted([5, end, *more])
    runs.stop_at(monkeypatch, moments)
    config.checkpoint.every_steps, config.data.threads = 10, 1  # may differ from the other run's
    stops = 0
    while True:
        try:
            train(config, tmp_path / "stopped")
            break
        except Preempted as error:
            stops += 1
            assert error.status == 75 and "start again to continue" in str(error)
    assert stops >= len(moments) - 1
    assert len(runs.lines(tmp_path / "stopped", "resume")) == stops
    runs.assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"buffer__policy": "class_random"}, marks=pytest.mark.exhaustive),
        {"buffer__policy": "reservoir"},
        pytest.param({"strategy": "icarl"}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: "-".join(changes.values()),
)
def test_a_run_moves_between_numbers_of_devices(changes, tmp_path, monkeypatch, caplog):
    """8 -> 4 -> 2 -> 8: no row of the buffer is lost or doubled on the way, and the run ends as well as any."""
    config = runs.small(**changes)
    steps = train(config, tmp_path / "whole", devices=8)["steps"]
    stops = [steps // 4, steps // 2, steps - 3]
    runs.stop_at(monkeypatch, stops)
    kept = None
    with caplog.at_level(logging.INFO, "jaxcl"):
        for devices in (8, 4, 2, 8):
            try:
                result = train(config, tmp_path / "moved", devices=devices)
            except Preempted:
                progress, arrays = runs.last(tmp_path / "moved")
                ids = arrays["buffer.id"]
                kept = np.sort(ids[ids >= 0])
                assert progress["devices"] == devices and len(kept) <= 40
    assert kept is not None and result["steps"] == steps and result["devices"]["count"] == 8
    assert [line["devices"] for line in runs.lines(tmp_path / "moved", "resume")] == [4, 2, 8]
    assert "saved by 8 devices of 1 processes, now 4 of 1: the buffer is divided anew" in caplog.text
    assert result["buffer"]["rows"] == 40 and len(result["buffer"]["rows_per_shard"]) == 8
    seen = [line["step"] for line in runs.lines(tmp_path / "moved", "train")]
    assert seen == [line["step"] for line in runs.lines(tmp_path / "whole", "train")]


@pytest.mark.parametrize(("every_steps", "what"), [(0, r"the loss is (nan|inf)"), (1, "(the loss|a parameter) is .*")])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_saved(every_steps, what, tmp_path, monkeypatch):
    """The weights explode in the second task, after the checkpoint at the end of the first."""
    original = task.take_steps

    def take_steps(lanes, step, state, *others):
        if lanes.at.task == 1:
            state = dataclasses.replace(state, params=jax.tree.map(lambda x: x * 1e30, state.params))
        return original(lanes, step, state, *others)

    monkeypatch.setattr(task, "take_steps", take_steps)
    config = runs.small(checkpoint__every_steps=every_steps)
    with pytest.raises(Diverged, match=rf"{what} at step \d+, task 1; checkpoints from before are kept") as error:
        train(config, tmp_path)
    assert isinstance(error.value, RunError) and error.value.status == 65
    progress, arrays = runs.last(tmp_path)
    assert progress["task"] == 1
    assert all(np.isfinite(x).all() for key, x in arrays.items() if key.startswith("params."))


def test_a_data_source_that_fails_ends_the_run_which_then_continues(tmp_path, monkeypatch):
    config = runs.small(checkpoint__every_steps=4)
    train(config, tmp_path / "whole")
    original = data.Loader.__getitem__

    def fail(self, t):
        if t == 9:
            raise OSError(errno.EIO, "disk gone")
        return original(self, t)

    with monkeypatch.context() as patch:
        patch.setattr(data.Loader, "__getitem__", fail)
        with pytest.raises(OSError, match="disk gone"):
            train(config, tmp_path / "failed")
    assert checkpoint.newest(tmp_path / "failed" / "checkpoints")["run"]["step"] == 8
    train(config, tmp_path / "failed")
    runs.assert_same_run(tmp_path / "whole", tmp_path / "failed")


def test_jumps_of_the_clock_change_nothing(tmp_path, monkeypatch):
    """A minute to and fro between any two readings. (Orbax measures its timeouts, of some minutes, by the wall
    clock: a greater jump forward during a save fails that save.)"""
    real, calls = time.time, itertools.count()
    config, saved = runs.small(checkpoint__every_seconds=100.0), []
    original = session_lib.Session.save
    monkeypatch.setattr(
        session_lib.Session, "save", lambda self, s: (saved.append(self.progress.name), original(self, s))
    )
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 60.0 * (next(calls) % 3 - 1))
        result = train(config, tmp_path / "jumped")
    assert saved == [f"{task:04d}-000000000" for task in (1, 2, 3)] and 0 < result["seconds"] < 300
    train(runs.small(), tmp_path / "whole")
    runs.assert_same_run(tmp_path / "whole", tmp_path / "jumped")


def test_the_workdir_is_held_against_a_second_run(tmp_path):
    with (
        workdir_lib.locked(tmp_path),
        pytest.raises(UserError, match="is in use by another run; wait for it or give another folder"),
    ):
        train(runs.small(), tmp_path)
    with workdir_lib.locked(tmp_path):  # given back
        pass


def test_an_unfinished_run_of_another_config_is_refused_unless_overwritten(tmp_path, monkeypatch):
    runs.stop_at(monkeypatch, [5])
    with pytest.raises(Preempted):
        train(runs.small(), tmp_path)
    other = runs.small(seed=3)
    with pytest.raises(UserError, match=r"another config's run \(config.seed is 0 there, 3 here\)"):
        train(other, tmp_path)
    assert checkpoint.newest(tmp_path / "checkpoints")["run"]["step"] == 5
    assert train(other, tmp_path, overwrite=True)["seed"] == 3
    assert not runs.lines(tmp_path, "resume")


def test_a_finished_run_whose_result_was_altered_leaves_the_same_result_again(tmp_path, caplog):
    """A digit of an accuracy: not believed; the last checkpoint, from which no step is left, tells it again."""
    train(runs.small(), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "altered")
    path = tmp_path / "altered" / "result.json"
    result = json.loads(path.read_text())
    result["accuracy_matrix"][0][0] += 0.125
    path.write_text(json.dumps(result))
    with caplog.at_level(logging.WARNING, "jaxcl"):
        train(runs.small(), tmp_path / "altered")
    assert (
        "result.json is damaged: its checksum is that of other contents: made anew from checkpoint 0003" in caplog.text
    )
    runs.assert_same_run(tmp_path / "whole", tmp_path / "altered")
    assert train(runs.small(), tmp_path / "altered") == json.loads(path.read_text())


def test_a_run_whose_log_was_torn_continues_and_loses_no_score(tmp_path, monkeypatch, caplog):
    whole = train(runs.small(), tmp_path / "whole")
    runs.stop_at(monkeypatch, [whole["steps"] - 2])
    with pytest.raises(Preempted):
        train(runs.small(), tmp_path / "torn")
    path = tmp_path / "torn" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:300])
    with caplog.at_level(logging.WARNING, "jaxcl"):
        result = train(runs.small(), tmp_path / "torn")
    assert "metrics.jsonl is damaged" in caplog.text
    assert result["accuracy_matrix"] == whole["accuracy_matrix"]
    kept = runs.lines(tmp_path / "torn", "train", "evaluation")  # every line is whole
    assert 1 < len(kept) < len(runs.lines(tmp_path / "whole", "train", "evaluation"))


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_the_last_checkpoint_is_whole(tmp_path):
    """On a file system of its own, a few megabytes large, filled up between two checkpoints; the command, as a user sees it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system here")
    try:
        status, errors = runs.wait(
            runs.start(disk / "run", "--devices=2", checkpoint__every_steps=3, checkpoint__keep=100)
        )
        shutil.copytree(disk / "run", tmp_path / "run", ignore=shutil.ignore_patterns("*.tmp", "*-tmp*"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert status == 74, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "disk is full" in line or "No space left" in line
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")["run"]["step"] >= 3
    config = runs.small()
    train(config, tmp_path / "run")
    train(config, tmp_path / "whole")
    runs.assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_kills_change_nothing(tmp_path):
    """SIGKILL at five random moments, two of them while a checkpoint is being written, and once a damaged one on top."""
    changes = {"epochs": 4, "checkpoint__every_steps": 5, "steps_per_call": 0}
    train(runs.small(**changes), tmp_path / "whole")
    killed, rng = tmp_path / "killed", random.Random(0)
    folder, moments = killed / "checkpoints", []
    for kill in range(5):
        before = runs.saved_step(folder)
        process = runs.start(killed, "--devices=2", **changes)
        # Progress first, so that kills do not all hit the same step; then an instant, or a save in progress.
        runs.until(lambda before=before: runs.saved_step(folder) > before, process)
        if kill < 2:
            runs.until(lambda: folder.is_dir() and any("tmp" in path.name for path in folder.iterdir()), process)
        else:
            runs.until(lambda: rng.random() < 0.05, process)
        assert process.poll() is None, "the run ended before it could be killed: make it longer"
        process.send_signal(signal.SIGKILL)
        runs.wait(process)
        moments.append(runs.saved_step(folder))
        if kill == 3:
            DAMAGE["one bit"](max(path for path in folder.iterdir() if (path / "manifest.json").exists()))
    status, errors = runs.wait(runs.start(killed, "--devices=2", **changes))
    assert status == 0, errors
    assert len(set(moments)) > 2
    runs.assert_same_run(tmp_path / "whole", killed)


@pytest.mark.slow
def test_the_command_says_what_ended_it_with_its_status(tmp_path):
    """SIGTERM: saved, 75. A second run on the same folder meanwhile: 2. Started again: 0, as if nothing had been."""
    changes = {"epochs": 4, "checkpoint__every_steps": 5}
    process = runs.start(tmp_path / "run", "--devices=2", **changes)
    runs.until(lambda: runs.saved_step(tmp_path / "run" / "checkpoints") > 0, process)
    process.send_signal(signal.SIGSTOP)  # it holds the folder for as long as it takes
    status, errors = runs.wait(runs.start(tmp_path / "run", "--devices=2", **changes))
    assert status == 2 and "is in use by another run" in errors and errors.count("\n") == 1
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    status, errors = runs.wait(process)
    assert status == 75 and errors.splitlines()[-1].startswith("error: SIGTERM: saved at step")
    status, errors = runs.wait(runs.start(tmp_path / "run", "--devices=2", **changes))
    assert status == 0 and "continued at step" in errors
    train(runs.small(**changes), tmp_path / "whole")
    runs.assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_signal_at_any_time_is_answered_and_the_run_goes_on(tmp_path):
    """While modules are imported, programs compiled, steps taken, a checkpoint is written, the test rows are evaluated."""
    changes = {"epochs": 2, "checkpoint__every_steps": 5, "steps_per_call": 0}
    folder = tmp_path / "run"
    steps = train(runs.small(**changes), tmp_path / "whole")["steps"]
    writing = lambda: any("tmp" in path.name for path in (folder / "checkpoints").glob("*"))  # noqa: E731
    logged = lambda: [line["step"] for line in runs.lines(folder, "train")] or [-1]  # noqa: E731
    evaluated = lambda: len(runs.lines(folder, "evaluation"))  # noqa: E731
    whole = runs.lines(tmp_path / "whole", "train", "evaluation")
    last = next(whole[i - 1]["step"] for i, line in enumerate(whole) if line["kind"] == "evaluation")
    moments = {
        "import": (signal.SIGINT, lambda: True),
        "compilation": (signal.SIGHUP, (folder / "config.json").exists),
        "steps": (signal.SIGTERM, lambda: logged()[-1] > 5),
        "save": (signal.SIGINT, writing),
        "evaluation": (signal.SIGHUP, lambda: logged()[-1] >= last),
    }
    for phase, (number, moment) in moments.items():
        process = runs.start(folder, "--devices=2", **changes)
        runs.until(lambda: heeds(process.pid), process)  # noqa: B023
        runs.until(moment, process)
        process.send_signal(number)
        status, errors = runs.wait(process)
        said = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert status == STATUS[number] and len(said) == 1 and said[0].startswith(f"error: {number.name}"), errors
        assert "Traceback" not in errors and ("nothing to save" in said[0]) == (phase in ("import", "compilation"))
    assert evaluated() < 3 and runs.saved_step(folder / "checkpoints") < steps
    status, errors = runs.wait(runs.start(folder, "--devices=2", **changes))
    assert status == 0, errors
    runs.assert_same_run(tmp_path / "whole", folder)


def test_progress_survives_json():
    progress = session_lib.Progress(step=3, task=1, iterator={"next_index": 2}, counts={"images": 3})
    progress.scores["accuracy"] = [[1 / 3, 0.1]]
    saved = progress.saved()
    again = session_lib.Progress(**json.loads(json.dumps(saved)))
    again.scores["top5"] = [[1.0]]
    progress.scores["top5"] = [[1.0]]
    assert "top5" not in saved["scores"]  # a copy
    assert again == progress and again.name == "0001-000000002"
    assert again.name < session_lib.Progress(task=2).name
