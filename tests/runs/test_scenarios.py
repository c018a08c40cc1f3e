"""Class masks and scenarios through the whole loop, on the built-in digits made tiny."""

import jax
import numpy as np
import pytest

from jaxcl.data import open_source
from jaxcl.training.build import build
from jaxcl.training.loop import train_and_evaluate
from tests.golden import tiny
from tests.whole import last


def test_class_masks_reach_the_step(tmp_path, mesh_of):
    """With one head a task a step moves the classes of its own task alone, whose gradients add up to nothing; with one head for
    all it moves the others too. The head's bias begins as zeros and has no other term."""
    for loss_classes, alone in (("all", False), ("task", True)):
        config = tiny("incremental")
        config.data.loss_classes = loss_classes
        train_and_evaluate(config, tmp_path / loss_classes, devices=jax.devices()[:2], progress=False)
        bias = last(tmp_path / loss_classes)[1]["params.head.bias"]
        tasks = [task.classes for task in build(config, jax.devices()[:2]).scenario.tasks]
        sums = [abs(float(bias[list(classes)].sum())) for classes in tasks]
        assert np.abs(bias).min() > 1e-4 and (max(sums) < 1e-5) == alone, sums


@pytest.mark.parametrize("scenario", ["domain", "permuted", "si_blurry"])
def test_other_scenarios(scenario, tmp_path, mesh_of):
    config = tiny("er")
    config.data.scenario = scenario
    config.buffer.policy = "reservoir"
    result = train_and_evaluate(config, tmp_path, devices=jax.devices()[:2], progress=False)
    tested = sum(map(sum, result["confusion"]))
    assert tested == len(open_source("digits")[1]) * (3 if scenario == "permuted" else 1)
    assert len(result["confusion"]) == (4 if scenario == "domain" else 10)
