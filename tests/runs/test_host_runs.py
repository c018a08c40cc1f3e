"""Whole runs with the memory in host memory: the same as on the devices, in several processes, stopped and continued."""

import contextlib
import itertools
import traceback

import jax
import numpy as np
import pytest

from jaxcl.buffer.host import HandoverError, Store
from jaxcl.errors import Preempted, UserError
from jaxcl.runs import checkpoint
from jaxcl.training.loop import train_and_evaluate
from tests import whole as runs


@pytest.mark.parametrize("strategy", ["er", pytest.param("der_pp", marks=pytest.mark.exhaustive)])
def test_two_processes_learn_the_same_in_both_tiers(strategy, tmp_path):
    for tier in ("device", "host"):
        processes = runs.start_all(tmp_path / tier, 2, 2, buffer__tier=tier, strategy=strategy)
        ends = [runs.wait(process) for process in processes]
        assert [status for status, _ in ends] == [0, 0], ends
    (_, device), (_, host) = (runs.last(tmp_path / tier) for tier in ("device", "host"))
    shared = [key for key in host if not key.startswith("staged.")]
    stored = {"buffer.record.image"} | ({"buffer.record.logits"} if strategy == "der_pp" else set())
    assert {*device} - {*host} >= stored and "params.Dense_0.kernel" in shared
    for key in shared:
        np.testing.assert_array_equal(host[key], device[key], err_msg=key)
    assert runs.lines(tmp_path / "device", "train") == runs.lines(tmp_path / "host", "train")
    shards = np.split(device["buffer.record.image"].reshape(len(device["buffer.id"]), -1), 4)
    for shard, stored in zip(shards, runs.host_rows(tmp_path / "host").values(), strict=True):
        np.testing.assert_array_equal(stored.reshape(len(shard), -1)[:, : shard.shape[1]], shard)


def test_a_run_stopped_and_continued_is_as_if_it_had_not_been(tmp_path, monkeypatch):
    config = runs.small(buffer__tier="host", checkpoint__keep=1)
    whole = train_and_evaluate(config, tmp_path / "whole", devices=jax.devices()[:2], progress=False)
    runs.stop_at(monkeypatch, [5, whole["steps"] - 2])
    for _ in range(2):
        with pytest.raises(Preempted):
            train_and_evaluate(config, tmp_path / "stopped", devices=jax.devices()[:2], progress=False)
    train_and_evaluate(config, tmp_path / "stopped", devices=jax.devices()[:2], progress=False)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    expected, found = runs.host_rows(tmp_path / "whole"), runs.host_rows(tmp_path / "stopped")
    assert expected.keys() == found.keys() and any(x.any() for x in expected.values())
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.slow
def test_both_tiers_move_alike_between_numbers_of_devices(tmp_path, monkeypatch):
    """8 -> 4 -> 8: the same ids in the same places, each with its own payload, and the same course from there."""
    for tier in ("device", "host"):
        runs.stop_at(monkeypatch, [10, 40])
        config = runs.small(buffer__tier=tier)
        for devices in (8, 4, 8):
            with contextlib.suppress(Preempted):
                train_and_evaluate(config, tmp_path / tier, devices=jax.devices()[:devices], progress=False)
        assert [line["devices"] for line in runs.lines(tmp_path / tier, "resume")] == [4, 8]
    assert runs.lines(tmp_path / "device", "train") == runs.lines(tmp_path / "host", "train")
    (_, device), (_, host) = (runs.last(tmp_path / tier) for tier in ("device", "host"))
    for key in {*device, *host} - {"buffer.record.image"}:
        if not key.startswith("staged."):
            np.testing.assert_array_equal(host[key], device[key], err_msg=key)
    stored = np.concatenate(list(runs.host_rows(tmp_path / "host").values()))
    np.testing.assert_array_equal(stored, device["buffer.record.image"].reshape(-1))


@pytest.mark.parametrize("part", ["_apply", "_gather"])
def test_a_writer_that_fails_ends_the_run_which_is_saved_and_continues(part, tmp_path, monkeypatch):
    """Before it has stored the rows of a step, or after that. Every step from there on would fail."""
    config, seen = runs.small(buffer__tier="host"), itertools.count()
    train_and_evaluate(config, tmp_path / "whole", devices=jax.devices()[:2], progress=False)
    original = getattr(Store, part)

    def break_down(*args):
        if next(seen) >= 7:
            raise OSError("the disk is on fire")
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="on fire") as caught:
        patch.setattr(Store, part, break_down)
        train_and_evaluate(config, tmp_path / "failed", devices=jax.devices()[:2], progress=False)
    assert any(frame.name == "_write" for frame in traceback.extract_tb(caught.value.__traceback__))
    steps = {"_apply": 8, "_gather": 7}[part]  # the first rows are gathered before the first step
    assert runs.last(tmp_path / "failed")[0]["step"] == steps
    train_and_evaluate(config, tmp_path / "failed", devices=jax.devices()[:2], progress=False)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "failed")
    np.testing.assert_equal(runs.host_rows(tmp_path / "failed"), runs.host_rows(tmp_path / "whole"))


def test_a_state_whose_rows_are_lost_is_not_saved(tmp_path, monkeypatch):
    original = Store.give

    def give(self, device, handover):
        if device or int(handover.step[0]) != 5:
            original(self, device, handover)

    monkeypatch.setattr(Store, "give", give)
    with pytest.raises(HandoverError, match="step 5 of device 0 is lost"):
        train_and_evaluate(runs.small(buffer__tier="host"), tmp_path, devices=jax.devices()[:2], progress=False)
    assert checkpoint.newest(tmp_path / "checkpoints") is None


def test_a_strategy_that_reads_the_memory_at_a_tasks_end_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"buffer.tier: host is not allowed with icarl"):
        train_and_evaluate(runs.small(buffer__tier="host", strategy="icarl"), tmp_path, progress=False)
