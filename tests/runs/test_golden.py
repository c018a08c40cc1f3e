"""Every strategy through the whole loop on 1 and 8 devices: the figures of tests/golden.json, and what holds of any run."""

import json

import numpy as np
import pytest

from jaxcl.data import open_source
from jaxcl.strategies import STRATEGIES, make_strategy
from tests import golden

GOLDEN = json.loads(golden.FILE.read_text())
CHANGED = "if this change is meant to alter what is trained, run `python -m tests.golden` and say so in the commit"


def case(strategy, devices):
    few = devices == 8 or strategy in ("er", "icarl")  # that devices do not matter, test_strategies.py says of a step
    return pytest.param(strategy, devices, marks=pytest.mark.slow if few else pytest.mark.exhaustive)


@pytest.mark.parametrize("strategy, devices", [case(s, n) for s in STRATEGIES for n in golden.DEVICES])
def test_a_whole_run(strategy, devices, tmp_path, mesh_of):
    mesh_of(devices)
    found, _ = golden.run(strategy, devices, tmp_path)
    recorded = GOLDEN[f"{strategy}/{devices}"]
    for i, (step, expected) in enumerate(zip(found["steps"], recorded["steps"], strict=True)):
        # Rounding differs between versions of XLA and grows with the steps; counts do not.
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if i < 2 else {"rtol": 0.05, "atol": 0.07}
        for name, value in expected.items():
            np.testing.assert_allclose(
                step[name], value, **tolerance, err_msg=f"step {step['step']}, {name}; {CHANGED}"
            )
    np.testing.assert_allclose(found["accuracy_matrix"], recorded["accuracy_matrix"], atol=0.07, err_msg=CHANGED)
    np.testing.assert_allclose(found["parameters"], recorded["parameters"], rtol=1e-2, err_msg=CHANGED)
    if not make_strategy(strategy).selection:  # else rows are chosen by features
        assert found["stored"] == recorded["stored"], CHANGED

    result = json.loads((tmp_path / "result.json").read_text())
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
