"""What the tests of whole runs share: a small config, commands in processes of their own, what a run has left."""

import importlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcl.runs import checkpoint
from jaxcl.runs import session as session_lib

REPO = pathlib.Path(__file__).resolve().parent.parent
SMALL = {
    "batch_size": 16,
    "epochs": 1,
    "steps_per_call": 1,  # a test's moments are steps
    "log_every": 3,
    "eval.batch_size": 64,
    "data.tasks": 3,
    "model.options.hidden": (16, 16),
    "optimizer.momentum": 0.9,
    "optimizer.learning_rate": 0.02,
    "buffer.capacity": 40,
    "buffer.representatives": 8,
    "buffer.candidates": 8,
    "strategies.ranpac.dim": 64,
    "checkpoint.every_seconds": 0.0,
}


def small(**changes: Any) -> ConfigDict:
    """The digits config, made small; `changes` with __ for the dots of a field."""
    config = importlib.import_module("configs.digits").get_config()
    changes = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def flags(config_changes: dict[str, Any]) -> list[str]:
    """`small(**changes)` as the flags of a command."""
    changes = SMALL | {name.replace("__", "."): value for name, value in config_changes.items()}
    return ["--config=configs/digits.py", *(f"--config.{name}={value}" for name, value in changes.items())]


def command(module: str, workdir: pathlib.Path, *more: str) -> subprocess.Popen:
    """A command as a user calls it: without what conftest sets for tests."""
    environment = {k: v for k, v in os.environ.items() if k not in ("NPROC", "JAX_PLATFORMS")}
    line = [sys.executable, "-m", module, f"--workdir={workdir}", *more]
    return subprocess.Popen(line, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start(workdir: pathlib.Path, *more: str, **changes: Any) -> subprocess.Popen:
    """`experiments.train` of the small config."""
    return command("experiments.train", workdir, *flags(changes), *more)


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_all(
    workdir: pathlib.Path, processes: int, devices: int, *more: str, **changes: Any
) -> list[subprocess.Popen]:
    """The same command for each of several processes of this machine."""
    address = free_address()
    own = (f"--coordinator={address}", f"--num_processes={processes}", f"--devices={devices}")
    return [start(workdir, *own, f"--process_id={i}", *more, **changes) for i in range(processes)]


def wait(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and standard error; the limit is there for a broken test, not for a slow machine."""
    try:
        _, errors = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
    return process.returncode, errors


def until(condition: Callable[[], Any], *processes: subprocess.Popen) -> None:
    """Waits for a condition, or for the end of a process, whichever comes first."""
    while not condition() and all(process.poll() is None for process in processes):
        time.sleep(0.005)


def lines(workdir: pathlib.Path, *kinds: str) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in found if line["kind"] in kinds]


def last(workdir: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Progress and arrays of the newest checkpoint."""
    manifest = checkpoint.newest(workdir / "checkpoints")
    assert manifest is not None
    target = {key: jax.ShapeDtypeStruct(tuple(x["shape"]), x["dtype"]) for key, x in manifest["arrays"].items()}
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=1)
    arrays = checkpoints.restore(manifest, target, reshaped=("",))
    checkpoints.close()
    return manifest["run"], {key: np.asarray(x) for key, x in arrays.items()}


def host_rows(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """The bytes of the rows in host memory in the newest checkpoint, by device."""
    files = sorted((workdir / "checkpoints").glob(f"*/{checkpoint.ROWS}/*"))
    assert files
    return {file.name: np.fromfile(file, np.uint8) for file in files if file.parent == files[-1].parent}


def saved_step(folder: pathlib.Path) -> int:
    """Of the newest checkpoint; -1 without any."""
    found = [-1]
    for path in folder.glob("*/manifest.json"):
        try:
            found.append(json.loads(path.read_text())["run"]["step"])
        except (OSError, ValueError):
            continue  # being removed
    return max(found)


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Every bit of the final state, the log and the result, but for times and the command."""
    (_, a), (_, b) = last(one), last(other)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    assert lines(one, "train", "evaluation") == lines(other, "train", "evaluation")
    ra, rb = (json.loads((folder / "result.json").read_text()) for folder in (one, other))
    times = ("seconds", "seconds_by_phase", "images_per_second", "background_seconds", "finished", "compilation")
    code = ("command", "code", "earlier_code")  # a command's code has its config file
    for name in (*times, *code, "config", "checksum"):
        ra.pop(name, None), rb.pop(name, None)
    assert ra == rb, {name: (ra.get(name), rb.get(name)) for name in {*ra, *rb} if ra.get(name) != rb.get(name)}


def assert_same_but_for_rounding(one: pathlib.Path, other: pathlib.Path, **tolerance: float) -> None:
    """The arrays of two runs' newest checkpoints: float32 to `rtol` and `atol`, what is discrete exactly."""
    (_, a), (_, b) = last(one), last(other)
    assert a.keys() == b.keys()
    for key in a:
        if a[key].dtype == np.float32:
            np.testing.assert_allclose(a[key], b[key], **tolerance, err_msg=key)
        else:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def stop_at(monkeypatch: Any, steps: Iterable[int]) -> None:
    """SIGTERM to this very process when these steps have been taken."""
    original, when = session_lib.Session.after_step, set(steps)

    def after_step(self: Any, step: int, outputs: Any) -> int:
        if due := {one for one in when if one <= step}:  # a call of many steps passes some by
            when.difference_update(due)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, outputs)

    monkeypatch.setattr(session_lib.Session, "after_step", after_step)
