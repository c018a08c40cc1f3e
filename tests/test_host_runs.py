"""Whole runs with the memory in host memory: the same as on the devices, in several processes, stopped and continued."""

import jax
import numpy as np
import pytest

from jaxcl import checkpoint
from jaxcl.errors import Preempted, UserError
from jaxcl.training.loop import train_and_evaluate
from tests import runs


def rows_of(folder):
    """The rows in the newest checkpoint, by device."""
    files = sorted((folder / "checkpoints").glob(f"*/{checkpoint.ROWS}/*"))
    assert files
    return {file.name: np.fromfile(file, np.uint8) for file in files if file.parent == files[-1].parent}


@pytest.mark.parametrize("strategy", ["er", "der_pp"])
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
    for shard, stored in zip(shards, rows_of(tmp_path / "host").values(), strict=True):
        np.testing.assert_array_equal(stored.reshape(len(shard), -1)[:, : shard.shape[1]], shard)


def test_a_run_stopped_and_continued_is_as_if_it_had_not_been(tmp_path, monkeypatch):
    config = runs.small(buffer__tier="host", checkpoint__keep=1)
    whole = train_and_evaluate(config, tmp_path / "whole", devices=jax.devices()[:2], progress=False)
    runs.stop_at(monkeypatch, [5, whole["steps"] - 2])
    for _ in range(2):
        with pytest.raises(Preempted):
            train_and_evaluate(config, tmp_path / "stopped", devices=jax.devices()[:2], progress=False)
    with pytest.raises(UserError, match=r"buffer.tier: .* on 2 devices cannot go on with 4"):
        train_and_evaluate(config, tmp_path / "stopped", devices=jax.devices()[:4], progress=False)
    train_and_evaluate(config, tmp_path / "stopped", devices=jax.devices()[:2], progress=False)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    expected, found = rows_of(tmp_path / "whole"), rows_of(tmp_path / "stopped")
    assert expected.keys() == found.keys() and any(x.any() for x in expected.values())
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_strategy_that_reads_the_memory_at_a_tasks_end_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"buffer.tier: host is not allowed with icarl"):
        train_and_evaluate(runs.small(buffer__tier="host", strategy="icarl"), tmp_path, progress=False)
