"""Whole runs beside what is not theirs, and with a damaged result."""

import logging
import shutil

import pytest

from jaxcl.errors import Preempted
from jaxcl.search.seeds import train_seeds
from jaxcl.training.loop import train_and_evaluate
from tests import whole as runs
from tests.folders import contents


def said(caplog, words):
    return sum(words in record.getMessage() for record in caplog.records if record.name == "jaxcl")


def test_a_run_goes_on_beside_copies_of_its_checkpoint(tmp_path, monkeypatch, caplog):
    """Also under a name that sorts behind all of its own."""
    config = runs.small(strategy="incremental")
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        runs.stop_at(patch, [5])
        train_and_evaluate(config, tmp_path / "run", progress=False)
    folder = tmp_path / "run" / "checkpoints"
    [own] = folder.iterdir()
    copies = [shutil.copytree(own, folder / name) for name in ("9999-000000000", "zuletzt", f"{own.name}-copy")]
    before = [contents(copy) for copy in copies]
    with caplog.at_level(logging.WARNING, "jaxcl"):
        train_and_evaluate(config, tmp_path / "run", progress=False)
    assert said(caplog, "not of this run and left alone") == 1
    assert [contents(copy) for copy in copies] == before
    for copy in copies:
        shutil.rmtree(copy)
    train_and_evaluate(config, tmp_path / "whole", progress=False)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_damaged_result_of_seeds_together_is_said_once_and_made_anew(tmp_path, caplog):
    folders = {seed: tmp_path / str(seed) for seed in (0, 1)}
    config = runs.small(strategy="incremental")
    first = train_seeds(config, folders, progress=False)
    (folders[1] / "result.json").write_text("{}")
    with caplog.at_level(logging.WARNING, "jaxcl"):
        again = train_seeds(config, folders, progress=False)
    assert said(caplog, "result.json is damaged") == 1 and again[0] == first[0]
    assert again[1]["accuracy_matrix"] == first[1]["accuracy_matrix"]
