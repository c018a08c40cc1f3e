"""Interrupts small runs at random moments, again and again, and looks how they end.

    python -m experiments.bench.interrupts [--runs=40] [--most=6] [--kill] [--seed=1] [--json=FILE]

One of SIGINT, SIGTERM and SIGHUP, or with --kill SIGKILL, at a moment between 0.1 s and the time that a whole run takes. The
next start continues the run. When it has finished, or was interrupted `most` times and then left alone, it is compared with one
that was never interrupted. Runs take turns between the tiers of the buffer. Each interrupt is a line: run, moment and signal,
exit status, seconds from the signal to the end. A status is right if it is the signal's own; where Python had not run the
command's first line, that of a process without handlers; 0 where the run had finished.
"""

import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Annotated

from experiments.bench import harness
from experiments.bench.harness import show
from experiments.pages.page import Json
from jaxcl.buffer import TIERS
from jaxcl.errors import UserError
from jaxcl.signals import STATUS

FLAGS = {
    "batch_size": 16,
    "epochs": 2,
    "log_every": 3,
    "data.tasks": 3,
    "model.options.hidden": (16, 16),
    "buffer.capacity": 40,
    "buffer.representatives": 8,
    "buffer.candidates": 8,
    "checkpoint.every_seconds": 0.0,
    "checkpoint.every_steps": 20,
}
LIMIT = 10.0  # seconds from a signal to the end
# Of a result, what differs between equal runs.
TIMES = (
    *("seconds", "seconds_by_phase", "background_seconds", "images_per_second", "compilation"),
    *("finished", "command", "checksum"),
)
REPO = pathlib.Path(__file__).resolve().parents[2]


def measure(
    runs: Annotated[int, "how many"] = 40,
    most: Annotated[int, "interrupts of a run"] = 6,
    kill: Annotated[bool, "whether by SIGKILL, which no process can answer"] = False,
    seed: Annotated[int, "of the moments, and of the signals"] = 1,
) -> Json:
    rng = random.Random(seed)
    found: list[Json] = []
    with tempfile.TemporaryDirectory() as folder:
        wanted, seconds = {}, {}
        for tier in TIERS:  # the first run of each compiles
            finish(pathlib.Path(folder, f"first-{tier}"), tier)
            begin = time.monotonic()
            wanted[tier] = finish(pathlib.Path(folder, f"whole-{tier}"), tier)
            seconds[tier] = time.monotonic() - begin
        equal = 0
        for number in range(runs):
            tier, run = TIERS[number % len(TIERS)], pathlib.Path(folder, str(number))
            for _ in range(most):
                number_of_signal = signal.SIGKILL if kill else rng.choice(list(STATUS))
                one = interrupt(run, tier, rng.uniform(0.1, seconds[tier]), number_of_signal)
                if one["signal"] is None:
                    break
                found.append({"run": number, "tier": tier, **one})
                show(found[-1])
            ended = finish(run, tier)
            check_commit(ended, wanted[tier])
            equal += ended == wanted[tier]
            shutil.rmtree(run)
    return {
        "seconds_of_a_run": seconds,
        "runs": runs,
        "runs_equal": equal,
        "interrupted": len(found),
        "wrong": sum(not one["right"] for one in found),
        "longest": max(one["seconds"] for one in found),
        "interrupts": found,
    }


def start(workdir: pathlib.Path, tier: str) -> subprocess.Popen:
    """What it says goes to a file beside its folder: a pipe that is not read would hold it."""
    changes = [f"--config.{name}={value}" for name, value in {**FLAGS, "buffer.tier": tier}.items()]
    line = [sys.executable, "-m", "experiments.train", "--config=configs/digits.py", f"--workdir={workdir}", *changes]
    with said_by(workdir).open("w") as file:
        return subprocess.Popen([*line, "--devices=2"], cwd=REPO, stdout=subprocess.DEVNULL, stderr=file)


def said_by(workdir: pathlib.Path) -> pathlib.Path:
    return workdir.with_suffix(".said")


def finish(workdir: pathlib.Path, tier: str) -> Json:
    """Of the run, started again, its outcome."""
    assert start(workdir, tier).wait() == 0, said_by(workdir).read_text()
    return outcome(workdir)


def interrupt(workdir: pathlib.Path, tier: str, moment: float, number: signal.Signals) -> Json:
    """Of a run that is started and gets a signal after `moment` seconds; None as its signal if it has finished before."""
    begin, process = time.monotonic(), start(workdir, tier)
    while process.poll() is None and time.monotonic() < begin + moment:
        time.sleep(0.01)
    if process.returncode is not None:
        assert process.returncode == 0, said_by(workdir).read_text()
        return {"moment": time.monotonic() - begin, "signal": None}
    owned = heeds(process.pid)
    process.send_signal(number)
    begin = time.monotonic()
    status = process.wait()
    seconds = time.monotonic() - begin
    said = said_by(workdir).read_text().replace(str(workdir), "WORKDIR")
    finished = status == 0 and (workdir / "result.json").exists()
    allowed = {STATUS[number]} if number in STATUS else set()
    allowed |= set() if owned and allowed else {-number}
    return {
        "moment": moment,
        "signal": number.name,
        "status": status,
        "seconds": seconds,
        "said": (said.splitlines() or [""])[-1],
        "right": (finished or status in allowed) and seconds < LIMIT and not (owned and "Traceback" in said),
    }


def heeds(pid: int) -> bool:
    """Whether the command has run its first line, on Linux: Python alone leaves SIGTERM as it is."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    (caught,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def check_commit(ended: Json, wanted: Json) -> None:
    """Whether the checkout is still the one that the whole runs were made of.

    Raises:
      UserError: it is not: no later run could be equal.
    """
    was, now = (one["result"]["commit"] for one in (wanted, ended))
    if was != now:
        raise UserError(
            f"the checkout: it has moved from commit {was} to {now} meanwhile; leave it alone and start again"
        )


def outcome(workdir: pathlib.Path) -> Json:
    """What equal runs have in common: the result but for its times, and the log of what was trained and evaluated."""
    result = json.loads((workdir / "result.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "result": {name: value for name, value in result.items() if name not in TIMES},
        "log": [line for line in lines if line["kind"] in ("train", "evaluation")],
    }


if __name__ == "__main__":
    harness.run(measure)
