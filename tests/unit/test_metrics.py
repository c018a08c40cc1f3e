"""The metrics of evaluation: against NumPy over all rows, on any number of devices, whatever the padding; one from outside."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxcl.data import class_incremental, make_normalize
from jaxcl.errors import UserError
from jaxcl.strategies import make_strategy
from jaxcl.training.evaluate import make_evaluate
from jaxcl.training.state import Weights
from tests.rig import SHAPE, K, Rig

ROWS, BATCH = 50, 16
RNG = np.random.default_rng(5)
IMAGES = RNG.integers(0, 256, (ROWS, *SHAPE)).astype(np.uint8)
LABELS = RNG.permutation(np.arange(ROWS) % K).astype(np.int32)
SCENARIO = class_incremental(LABELS, LABELS, K, 3)
OUTSIDE = """
import jax.numpy as jnp

def margin(rows):
    return jnp.max(rows.scores, axis=1) - jnp.take_along_axis(rows.scores, rows.label[:, None], 1)[:, 0]

def accuracy(rows):
    return rows.label == 0
"""


def batches():
    """All rows in batches of 16, the last with padding that holds a label and an image of its own."""
    for begin in range(0, ROWS, BATCH):
        ids = np.full(BATCH, -1, np.int32)
        ids[: ROWS - begin] = np.arange(begin, min(begin + BATCH, ROWS))
        yield {"image": IMAGES[ids], "label": LABELS[ids], "id": ids, "valid": ids >= 0}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "outside_metric.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)


def scores(mesh, metrics, seeds=()):
    """What `evaluate` gives, and the logits of all rows, of one seed's weights or of several."""
    rig = Rig(mesh, make_strategy("incremental"))
    each = [rig.new_weights(jax.random.key(seed))[0] for seed in seeds or (0,)]
    normalize = make_normalize(SHAPE)
    params = jax.tree.map(lambda *x: np.stack(x), *each) if seeds else each[0]
    bound = dataclasses.replace(rig.bound, classes=SCENARIO.class_table)
    evaluate = make_evaluate(bound, SCENARIO.task_of_test_row, seeds=bool(seeds), metrics=metrics)
    logits = [np.asarray(rig.model.apply(x, {}, normalize(IMAGES), train=False)[0]["logits"]) for x in each]
    return evaluate(Weights(params, {}, {}, np.zeros(len(seeds) if seeds else (), np.int32)), batches()), logits


def by_task(x):
    return [x[task.test].mean() for task in SCENARIO.tasks]


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_every_row_counts_once_in_its_task(devices, outside, mesh_of):
    found, (logits,) = scores(mesh_of(devices), ["outside_metric:margin"])
    own = logits[np.arange(ROWS), LABELS]
    rank = (logits > own[:, None]).sum(1)
    task = np.array([i for label in LABELS for i, t in enumerate(SCENARIO.tasks) if label in t.classes])
    among = np.where(SCENARIO.class_table[task], logits, -np.inf)
    assert set(found) == {"accuracy", "top5", "accuracy_in_task", "margin", "confusion"}
    assert found["accuracy"].tolist() == by_task(rank == 0) and found["top5"].tolist() == by_task(rank < 5)
    assert found["accuracy_in_task"].tolist() == by_task(among.argmax(1) == LABELS)
    np.testing.assert_allclose(found["margin"], by_task(logits.max(1) - own), rtol=1e-5)
    confusion = np.zeros((K, K), int)
    np.add.at(confusion, (LABELS, logits.argmax(1)), 1)
    np.testing.assert_array_equal(found["confusion"], confusion)
    assert len(set(found["accuracy"].tolist())) > 1


def test_several_seeds_have_scores_of_their_own(mesh_of):
    found, logits = scores(mesh_of(4), [], seeds=(1, 2))
    expected = [by_task(x.argmax(1) == LABELS) for x in logits]
    assert found["accuracy"].tolist() == expected and expected[0] != expected[1]
    assert found["confusion"].shape == (2, K, K)


def test_a_metric_that_cannot_be_told_is_refused(outside, mesh_of):
    for name, message in (
        ("acuracy_in_task", "eval.metrics: 'acuracy_in_task' is unknown, did you mean accuracy_in_task?"),
        (
            "outside_metric:accuracy",
            "eval.metrics: 'outside_metric:accuracy' is not allowed, give a metric that is not ",
        ),
        ("outside_metric:missing", "eval.metrics: 'outside_metric:missing' cannot be imported"),
        ("error", "eval.metrics: error is not allowed where rows are classified"),
    ):
        with pytest.raises(UserError) as info:
            scores(mesh_of(1), [name])
        assert str(info.value).startswith(message)
    assert set(scores(mesh_of(1), ["accuracy"])[0]) == {"accuracy", "top5", "accuracy_in_task", "confusion"}
