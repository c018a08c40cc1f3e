"""The exemplars of a task: which rows enter the memory at its end, on any number of devices."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxcl.data import array_source, make_normalize
from jaxcl.strategies import make_strategy
from jaxcl.training.exemplars import make_store_exemplars
from tests.rig import CLASSES, SHAPE, K, Rig, make_batch
from tests.test_buffer_policies import greedy

CAPACITY, PER_CLASS = 48, 26  # 48 is shared evenly by 4 devices and 2, 4 or 6 classes


def rows_of(task: int, images: np.ndarray, labels: np.ndarray, size: int = 8):
    """The task's rows in batches with padding at the end, as the loader makes them."""
    ids = np.flatnonzero(CLASSES[task][labels])
    for begin in range(0, len(ids), size):
        ident = np.full(size, -1, np.int32)
        part = ids[begin : begin + size]
        ident[: len(part)] = part
        yield {"image": images[ident], "label": labels[ident], "id": ident, "valid": ident >= 0}


@pytest.mark.parametrize("memory", ["sharded", "replicated"])
@pytest.mark.parametrize("devices", [1, 4])
def test_the_memory_holds_the_best_of_every_class_whatever_the_devices(devices, memory, mesh_of):
    """After each task: of each class seen the first 48 / (classes seen) rows that the greedy oracle chooses from all."""
    options = {"policy": "herding", "num_classes": K, "memory": memory}
    rig = Rig(mesh_of(devices), make_strategy("icarl"), capacity=CAPACITY, memory=options)
    rng, normalize = np.random.default_rng(3), make_normalize(SHAPE)
    labels = rng.permutation(np.arange(K).repeat(PER_CLASS)).astype(np.int32)
    images = rng.integers(0, 256, (len(labels), *SHAPE)).astype(np.uint8)
    source = array_source(images, labels, [str(k) for k in range(K)])
    store = make_store_exemplars(
        rig.mesh, rig.model, rig.strategy, rig.buffer, normalize, source, CLASSES,
        batch_size=8, sharded=memory == "sharded",
    )  # fmt: skip
    state, best = rig.state(), {}
    for task, classes in enumerate(CLASSES):
        weights = rig.new_weights(jax.random.key(task))  # every task leaves another model
        state = rig.state(params=weights[0]) if task == 0 else dataclasses.replace(state, params=weights[0])
        features = rig.model.apply(state.params, {}, normalize(images), train=False)[0]["features"]
        features = np.asarray(features, np.float64)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        for k in np.flatnonzero(classes):
            mine = np.flatnonzero(labels == k)
            best[k] = mine[greedy(features[mine], features[mine].mean(0), CAPACITY // 2)]
        state = store(state, task, rows_of(task, images, labels))
        each = CAPACITY // len(best)
        expected = sorted(np.concatenate([order[:each] for order in best.values()]))
        for held in np.asarray(state.buffer.id).reshape(1 if memory == "sharded" else devices, -1):
            assert sorted(held) == expected
    np.testing.assert_array_equal(state.buffer.label, labels[state.buffer.id])
    np.testing.assert_array_equal(state.buffer.record["image"], images[state.buffer.id])


def test_no_row_enters_while_a_task_lasts(mesh_of):
    rig = Rig(mesh_of(2), make_strategy("icarl"), memory={"policy": "herding", "num_classes": K})
    state, _ = rig.step(rig.state(), rig.rows(make_batch(0)))
    assert rig.buffer.stats(state.buffer)["rows"] == 0
