"""Every strategy through the whole loop, on the built-in digits made tiny."""

import jax
import numpy as np
import pytest

from jaxcl.data import open_source
from jaxcl.strategies import STRATEGIES, make_strategy
from jaxcl.training.config import default_config
from jaxcl.training.loop import train_and_evaluate


def tiny(strategy: str):
    config = default_config()
    config.strategy, config.batch_size, config.eval.batch_size = strategy, 64, 256
    config.data.tasks, config.data.threads = 3, 1
    config.model.options = {"hidden": (16,)}
    config.buffer.capacity, config.buffer.representatives = 60, 16
    config.strategies.gdumb.epochs = 2
    return config


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_whole_run(strategy, tmp_path, mesh_of):
    result = train_and_evaluate(tiny(strategy), tmp_path, devices=jax.devices()[:2], progress=False)
    matrix = np.array(result["accuracy_matrix"])
    assert matrix.shape == (3, 3) and np.isfinite(matrix).all()
    assert (result["buffer"] is None) == (make_strategy(strategy).draws == 0)
    confusion = np.array(result["confusion"])
    assert confusion.sum() == len(open_source("digits")[1])
    right, rows = np.diag(confusion), confusion.sum(1)  # the last row of the matrix, told class by class
    expected = [right[list(task)].sum() / rows[list(task)].sum() for task in result["tasks"]]
    np.testing.assert_allclose(matrix[-1], expected, rtol=1e-6)
    assert (np.array(result["accuracy_in_task"]) >= matrix[-1] - 1e-9).all()  # fewer classes to mistake it for
    assert np.isfinite(result["forward_transfer"])
    if strategy == "joint":  # one training serves all tasks
        assert (matrix == matrix[0]).all()
    else:
        assert (matrix[1:] != matrix[:-1]).any(axis=1).all()


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
