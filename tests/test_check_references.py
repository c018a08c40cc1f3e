"""The table of references: what holds is told from what does not; every row's config is one that runs."""

import importlib
import json

import pytest

from experiments import check_references
from jaxcl.errors import UserError
from jaxcl.training.config import check_config, default_config

PROTOCOLS = ("split_mnist_mammoth", "permuted_mnist_mammoth")


def test_a_row_holds_down_to_one_deviation_below_the_reference():
    def ours(mean):
        return {"mean": mean, "std": 0.1, "accuracy": [mean, mean], "seconds": 1.0}

    reference = {name: {"mean": 90.0, "std": 0.5} for name in ("at", "below", "above", "missing")}
    found = {"at": ours(89.5), "below": ours(89.49), "above": ours(95.0)}
    lines = check_references.table(reference, found, 5).splitlines()[2:]
    verdicts = [[cell.strip() for cell in line.split("|")][5] for line in lines]
    assert verdicts == ["yes", "**no**", "yes", ""]
    assert "not run" in lines[3]


def test_the_page_is_that_of_the_files():
    assert check_references.PAGE.read_text() == check_references.page(check_references.RESULTS)


def test_summary():
    run = {"seconds": 2.0, "devices": {}, "versions": {}}
    found = check_references.summary([{**run, "average_accuracy": a} for a in (0.5, 0.7)])
    assert (found["mean"], found["std"], found["accuracy"]) == (60.0, 14.142, [50.0, 70.0])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_row_has_a_config_and_a_reference(protocol):
    module = importlib.import_module(f"configs.{protocol}")
    reference = json.loads((check_references.RESULTS / f"{protocol}.reference.json").read_text())
    assert list(reference["rows"]) == list(module.ROWS)
    for row in module.ROWS:
        check_config(module.get_config(row), devices=1)
    with pytest.raises(UserError, match=f"configs/{protocol}.py:er-1: no such row"):
        module.get_config("er-1")


def test_mir_cannot_replay_more_than_is_drawn():
    config = default_config()
    config.strategy, config.buffer.representatives, config.strategies.mir.replayed = "mir", 8, 9
    with pytest.raises(UserError, match=r"^strategies.mir.replayed: 9 is more than a step draws, give at most buffer"):
        check_config(config, devices=1)
