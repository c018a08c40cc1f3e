"""Where scalars go: each writer's own file, what a continued run finds there, and one that fails."""

import importlib.util
import json
import logging
import pathlib
import struct
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.runs import log, workdir
from jaxcl.runs.writers import Writers, csv, flat
from jaxcl.training.config import check_config
from jaxcl.training.loop import train_and_evaluate
from tests.folders import begin, claim
from tests.golden import tiny

SETTINGS = {"name": "digits", "strategy": "er", "seed": 3, "buffer.capacity": 200, "rate": 0.5, "nesterov": True}
REPO = pathlib.Path(__file__).resolve().parents[2]
TAKEN = []  # by `Kept`


class Kept:
    """A writer from outside, which keeps what it is given."""

    def __init__(self, folder, settings, step):
        TAKEN.append((folder, settings, step))

    def write(self, step, scalars):
        TAKEN.append((step, dict(scalars)))

    def close(self):
        TAKEN.append("closed")


class Broken(Kept):
    """The same, which cannot write."""

    def write(self, step, scalars):
        raise OSError("the server\nis gone")


def never(folder, settings, step):
    raise ImportError("no such package")


KEPT, BROKEN, NEVER = (f"{__name__}:{name}" for name in ("Kept", "Broken", "never"))


def events(folder):
    """What TensorBoard reads in the files of a folder: (step, tag, value, plugin), in order."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.*.jaxcl"), key=lambda path: path.stat().st_mtime_ns):
        raw = path.read_bytes()
        while raw:
            (size,) = struct.unpack("<Q", raw[:8])
            event = Event.FromString(raw[12 : 12 + size])
            raw = raw[16 + size :]
            found += [(event.step, x.tag, x.simple_value, x.metadata.plugin_data) for x in event.summary.value]
    return found


def test_tensorboard_has_scalars_and_hyper_parameters(tmp_path):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    writers = Writers(("tensorboard",), tmp_path, SETTINGS, None)
    writers.write(5, {"train/loss": 0.25})
    writers.close()
    found = events(tmp_path)
    assert (5, "train/loss", 0.25) in [event[:3] for event in found]
    plugins = {tag: HParamsPluginData.FromString(x.content) for _, tag, _, x in found if x.plugin_name == "hparams"}
    start = plugins["_hparams_/session_start_info"].session_start_info.hparams
    assert start["buffer.capacity"].number_value == 200 and start["strategy"].string_value == "er"
    assert start["nesterov"].bool_value
    compared = [x.name.tag for x in plugins["_hparams_/experiment"].experiment.metric_infos]
    assert "evaluation/accuracy" in compared and "evaluation/forgetting" in compared


def test_csv_is_cut_to_the_checkpoint(tmp_path):
    writers = Writers(("csv",), tmp_path, SETTINGS, None)
    for step in (1, 2, 3):
        writers.write(step, {"train/loss": 1 / step, "a,b": step})
    writers.close()
    with (tmp_path / "scalars.csv").open("a") as file:
        file.write("1,tor")  # killed as it wrote
    again = Writers(("csv",), tmp_path, SETTINGS, 2)
    again.write(3, {"train/loss": 0.125})
    again.close()
    lines = (tmp_path / "scalars.csv").read_text().splitlines()
    assert lines[0] == "step,name,value" and len(lines) == 6
    assert lines[1:3] == ["1,train/loss,1.0", "1,a;b,1"] and lines[-1] == "3,train/loss,0.125"
    Writers(("csv",), tmp_path, SETTINGS, None).close()
    assert (tmp_path / "scalars.csv").read_text() == csv.HEADER


def test_a_table_of_someone_else_is_left_alone(tmp_path, caplog):
    (tmp_path / "scalars.csv").write_text("mine\n")
    begin(tmp_path / "run")
    for overwrite in (False, True):
        (tmp_path / "run" / "scalars.csv").write_text("mine\n")
        claim(tmp_path / "run", overwrite)
        writers = Writers(("csv",), tmp_path / "run", SETTINGS, None)
        writers.write(1, {"x": 1.0})
        assert (tmp_path / "run" / "scalars.csv").read_text() == "mine\n"
    assert "csv has failed and is left out" in caplog.text and "is not a file of jaxcl; remove it" in caplog.text
    (tmp_path / "run" / "scalars.csv").write_text(csv.HEADER)
    claim(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "scalars.csv").exists()


@pytest.mark.parametrize("name", [BROKEN, NEVER])
def test_a_writer_that_fails_is_said_once_and_the_others_go_on(name, tmp_path, caplog):
    TAKEN.clear()
    lines = log.Log(tmp_path, True, None, (name, KEPT), SETTINGS)
    with caplog.at_level(logging.WARNING, "jaxcl"):
        for step in (1, 2):
            lines.write("train", step, {"loss": 0.5, "rows": 3})
        lines.close()
    (said,) = [record.getMessage() for record in caplog.records if record.name == "jaxcl"]
    assert said.startswith(f"writers: {name} has failed and is left out; the run goes on (") and "\n" not in said
    assert [taken for taken in TAKEN if taken[0] in (1, 2)] == [(step, {"train/loss": 0.5}) for step in (1, 2)]
    assert TAKEN[-1] == "closed"
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_settings_are_flat():
    config = ConfigDict({"a": {"b": 1, "c": None}, "d": (1, 2), "e": True, "f": "x"})
    assert flat(workdir.resolved(config)) == {"a.b": 1, "d": "[1, 2]", "e": True, "f": "x"}


@pytest.mark.parametrize("name", ["tensorbord", f"{__name__}:nothing", "no_such_module:x"])
def test_a_writer_that_does_not_exist_is_refused(name):
    config = tiny("er")
    config.writers = (name,)
    with pytest.raises(UserError, match=r"^writers: "):
        check_config(config, 1)


def test_a_run_shows_scores_forgetting_and_the_buffer(tmp_path):
    """As result.json has them. The writers may change when a run goes on, and one that is broken changes nothing."""
    config = tiny("er")
    config.writers = ("tensorboard", "csv", BROKEN)
    result = train_and_evaluate(config, tmp_path, devices=jax.devices()[:2], progress=False)
    shown = {tag: value for _, tag, value, _ in events(tmp_path)}
    rows = (line.split(",") for line in (tmp_path / "scalars.csv").read_text().splitlines()[1:])
    table = {name: float(value) for _, name, value in rows}
    for found, error in ((table, 1e-12), (shown, 1e-6)):  # events hold float32
        assert found["evaluation/accuracy"] == pytest.approx(result["average_accuracy"], abs=error)
        assert found["evaluation/top5"] == pytest.approx(result["average_top5"], abs=error)
        assert found["evaluation/forgetting"] == pytest.approx(result["forgetting"]["chaudhry"], abs=error)
        last = [found[f"accuracy_by_task/task_{j}"] for j in (1, 2, 3)]
        np.testing.assert_allclose(last, result["accuracy_matrix"][-1], atol=error)
        assert found["buffer/rows"] == result["buffer"]["rows"] == 64
        assert found["buffer/rows_of_most_class"] == max(result["buffer"]["class_histogram"])
    config.writers = ()
    assert train_and_evaluate(config, tmp_path, devices=jax.devices()[:2], progress=False) == result


OUTSIDE = """
import pathlib, sys
from jaxcl.runs.writers import Writers
settings, folder = {"name": "digits", "seed": 3, "buffer.capacity": 200}, pathlib.Path(sys.argv[2])
for step in (None, 2):
    writers = Writers((sys.argv[1],), folder, settings, step)
    writers.write(step or 1, {"train/loss": 0.5})
    writers.write((step or 1) + 1, {"train/loss": 0.25})
    writers.close()
"""


def outside(name, folder, *needs):
    """Two sessions of a writer of another package, in a process of their own."""
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, name, str(folder)], cwd=REPO, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "has failed" not in done.stderr, done.stderr


@pytest.mark.slow
def test_wandb_offline_keeps_the_id_of_a_continued_run(tmp_path):
    outside("wandb", tmp_path, "wandb")
    found = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert found and len({path.stem for path in found}) == 1
    assert b"train/loss" in found[0].read_bytes() and b"buffer.capacity" in found[0].read_bytes()


@pytest.mark.slow
def test_mlflow_keeps_the_record_of_a_continued_run(tmp_path):
    outside("mlflow", tmp_path, "mlflow", "sqlalchemy", "alembic")
    import sqlite3

    with sqlite3.connect(tmp_path / "mlflow" / "mlflow.db") as data:
        assert data.execute("select count(*), min(status) from runs").fetchone() == (1, "FINISHED")
        assert sorted(data.execute("select key, step, value from metrics")) == [
            *(("train/loss", step, value) for step, value in ((1, 0.5), (2, 0.25), (2, 0.5), (3, 0.25))),
        ]
        assert ("buffer.capacity", "200") in data.execute("select key, value from params").fetchall()
