"""Seeds trained as one program: each leaves what it leaves alone, to rounding; stopped, continued, continued alone."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from jaxcl.errors import Preempted, UserError
from jaxcl.search.seeds import train_seeds, with_seed
from jaxcl.training.loop import train_and_evaluate
from tests.whole import assert_same_but_for_rounding, assert_same_run, last, lines, small, stop_at

TIMES = {"seconds", "seconds_by_phase", "images_per_second", "seeds_together"}


def config_of(strategy):
    return small(strategy=strategy, data__tasks=2, optimizer__momentum=0.0)


def folders(path):
    return {seed: path / f"seed_{seed}" for seed in (3, 5)}


def assert_close_runs(one, other):
    """The same run but for rounding: integers, such as the ids in the buffer, are the same."""
    (progress_a, _), (progress_b, _) = last(one), last(other)
    assert (progress_a["step"], progress_a["counts"]) == (progress_b["step"], progress_b["counts"])
    assert_same_but_for_rounding(one, other, rtol=1e-3, atol=1e-5)
    logs = [lines(folder, "train", "evaluation") for folder in (one, other)]
    for x, y in zip(*logs, strict=True):
        assert x.keys() == y.keys()
        assert all(x[k] == y[k] for k in ("kind", "step", "task"))
        assert x.get("loss", 0.0) == pytest.approx(y.get("loss", 0.0), rel=1e-3)
    ra, rb = (json.loads((folder / "result.json").read_text()) for folder in (one, other))
    assert ra.keys() - TIMES == rb.keys() - TIMES
    for name in ("seed", "config", "steps", "images", "buffer", "tasks", "devices"):
        assert ra[name] == rb[name], name
    # Of 143 or more test rows a task one may lie at the border of two classes.
    for name in ("accuracy_matrix", "accuracy_in_task", "forward_transfer"):
        np.testing.assert_allclose(ra[name], rb[name], atol=0.01)
    assert np.abs(np.subtract(ra["confusion"], rb["confusion"])).sum() <= 4


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """iCaRL, which has a buffer, a state and an end of task, with two seeds as one program on two devices, not interrupted."""
    where = folders(tmp_path_factory.mktemp("together"))
    results = train_seeds(config_of("icarl"), where, devices=jax.devices()[:2], progress=False)
    assert [(result["seed"], result["seeds_together"]) for result in results] == [(3, 2), (5, 2)]
    return where


def test_a_seed_among_others_is_the_run_alone(together, tmp_path):
    train_and_evaluate(with_seed(config_of("icarl"), 5), tmp_path, devices=jax.devices()[:2], progress=False)
    assert_close_runs(together[5], tmp_path)
    for folder in (together[5], tmp_path):  # where the time went, at the end of every task
        [events] = folder.glob("events.out.*")
        assert {f"seconds_foreground/{phase}".encode() for phase in ("load", "train", "evaluate")} <= set(
            re.findall(rb"seconds_foreground/\w+", events.read_bytes())
        )
    (_, three), (_, five) = last(together[3]), last(together[5])
    assert not np.array_equal(three["buffer.id"], five["buffer.id"])


def test_new_weights_are_each_seeds_own(tmp_path):
    where = folders(tmp_path / "together")
    train_seeds(config_of("from_scratch"), where, devices=jax.devices()[:1], progress=False)
    config = with_seed(config_of("from_scratch"), 5)
    train_and_evaluate(config, tmp_path / "alone", devices=jax.devices()[:1], progress=False)
    assert_close_runs(where[5], tmp_path / "alone")


def test_stopped_and_continued_together_or_alone(together, tmp_path, monkeypatch):
    where, config, devices = folders(tmp_path), config_of("icarl"), jax.devices()[:2]
    stop_at(monkeypatch, [13])
    with pytest.raises(Preempted, match="saved at step 13"):
        train_seeds(config, where, devices=devices, progress=False)
    shutil.copytree(where[5], tmp_path / "alone")
    train_and_evaluate(with_seed(config, 5), tmp_path / "alone", devices=devices, progress=False)
    assert_close_runs(together[5], tmp_path / "alone")
    train_seeds(config, where, devices=devices, progress=False)
    for seed in where:
        assert_same_run(together[seed], where[seed])
    finished = (where[3] / "result.json").stat().st_mtime_ns
    train_seeds(config, where, devices=devices, progress=False)
    assert (where[3] / "result.json").stat().st_mtime_ns == finished


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"strategy": "gdumb"}, "--vmap: not allowed with gdumb, which trains new weights"),
        ({"buffer__tier": "host"}, "--vmap: not allowed with buffer.tier = host"),
    ],
)
def test_what_cannot_be_trained_together_is_said_at_once(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_seeds(small(**changes), folders(tmp_path))
    assert not list(tmp_path.iterdir())
