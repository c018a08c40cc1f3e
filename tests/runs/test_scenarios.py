"""Class masks and scenarios through the whole loop, on the built-in digits made tiny."""

import jax
import pytest

from jaxcl.data import open_source
from jaxcl.training.loop import train_and_evaluate
from tests.golden import tiny


def test_class_masks_and_options_reach_the_step(tmp_path, mesh_of):
    """With one head a task, classes are pushed down by their own task alone: another run than with one head for all."""
    runs = []
    for loss_classes in ("all", "task"):
        config = tiny("incremental")
        config.data.loss_classes = loss_classes
        runs.append(train_and_evaluate(config, tmp_path / loss_classes, devices=jax.devices()[:2], progress=False))
    assert runs[0]["accuracy_matrix"] != runs[1]["accuracy_matrix"]


@pytest.mark.parametrize("scenario", ["domain", "permuted", "si_blurry"])
def test_other_scenarios(scenario, tmp_path, mesh_of):
    config = tiny("er")
    config.data.scenario = scenario
    config.buffer.policy = "reservoir"
    result = train_and_evaluate(config, tmp_path, devices=jax.devices()[:2], progress=False)
    tested = sum(map(sum, result["confusion"]))
    assert tested == len(open_source("digits")[1]) * (3 if scenario == "permuted" else 1)
    assert len(result["confusion"]) == (4 if scenario == "domain" else 10)
