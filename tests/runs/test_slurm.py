"""scripts/slurm.sh on a SLURM of this machine: two tasks train, are told to stop, are preempted, and go on to the end."""

import json
import os
import pathlib
import sys
import tempfile

import jax
import numpy as np
import pytest

from jaxcl.training.loop import train_and_evaluate
from tests import slurm
from tests.whole import REPO, flags, lines, small

CHANGES = {"epochs": 15}  # long enough to be stopped twice


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())
def test_two_tasks_are_stopped_and_requeued_and_end_as_one_run(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out.txt"
    python = str(pathlib.Path(sys.executable).parent)
    with tempfile.TemporaryDirectory() as folder, slurm.cluster(pathlib.Path(folder)) as cluster:
        cluster.environment |= {
            "PATH": f"{python}:{cluster.environment['PATH']}",
            "NPROC": "16",
            "PYTHONPATH": str(REPO),
        }
        for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
            cluster.environment.pop(name, None)
        size = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", f"--output={out}", f"--chdir={REPO}")
        number = cluster.call(
            "sbatch",
            "--parsable",
            *size,
            str(REPO / "scripts" / "slurm.sh"),
            *flags(CHANGES),
            f"--workdir={run}",
            "--devices=2",
        )

        def told():
            return f"{cluster.job(number)}\n{out.read_text() if out.exists() else ''}"

        def after(restarts):
            """Waits until steps have been taken since so many restarts."""
            begun = 0 if restarts == 0 else lines(run, "resume")[restarts - 1]["step"]
            slurm.until(lambda: lines(run, "train") and lines(run, "train")[-1]["step"] > begun + 20, 300, told)

        after(0)
        cluster.call(
            "scancel", "--signal=TERM", number
        )  # as --signal does it before the time is up: the script requeues
        slurm.until(lambda: len(lines(run, "resume")) == 1, 300, told)
        after(1)
        cluster.call("scontrol", "requeue", number)  # as a job of a higher priority does it
        slurm.until(lambda: len(lines(run, "resume")) == 2, 300, told)
        slurm.until(lambda: cluster.job(number)["JobState"] in ("COMPLETED", "FAILED"), 300, told)
        assert cluster.job(number)["JobState"] == "COMPLETED" and cluster.job(number)["Restarts"] == "2", told()
    said = out.read_text()
    assert "0: process 0 of 2: " in said and said.count("continued at step") == 4, said  # by both processes, twice
    assert "SIGTERM: saved at step" in said, said
    result = json.loads((run / "result.json").read_text())
    assert result["devices"]["processes"] == 2 and result["devices"]["count"] == 4
    whole = train_and_evaluate(small(**CHANGES), tmp_path / "whole", devices=jax.devices()[:4], progress=False)
    assert result["steps"] == whole["steps"]
    np.testing.assert_allclose(result["accuracy_matrix"], whole["accuracy_matrix"], atol=0.02)
    assert not os.path.exists(folder)
