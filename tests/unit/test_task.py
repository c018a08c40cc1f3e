"""What a task of a run begins with and passes on: its weights, its learning rates, what its memory accepts."""

import jax
import numpy as np
import pytest

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows
from jaxcl.training.build import build
from jaxcl.training.loop import train_and_evaluate
from jaxcl.training.task import weights_of
from tests.rig import close
from tests.whole import last, lines, small


@pytest.mark.parametrize(("strategy", "renewed"), [("from_scratch", True), ("gdumb", True), ("er", False)])
def test_the_weights_of_a_task_are_new_or_those_of_the_task_before(strategy, renewed, tmp_path):
    """Steps too small to move a weight: a run ends with the weights that its last task began with, or its first one."""
    rate = 1e-20
    config = small(strategy=strategy, strategies__gdumb__epochs=1, optimizer__learning_rate=rate)
    devices = jax.devices()[:1]
    train_and_evaluate(config, tmp_path, devices=devices, progress=False)
    _, arrays = last(tmp_path)
    parts = build(config, devices)
    began = {task: weights_of(config, parts, task)[0] for task in (0, 2)}
    for layer, leaves in began[2 if renewed else 0].items():
        found = {name: arrays[f"params.{layer}.{name}"] for name in leaves}
        close(found, leaves, rtol=0, atol=1e6 * rate)
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, began.values()), strict=True))


def test_every_task_begins_the_schedule_anew_in_its_own_epochs(tmp_path):
    """Half a cosine a task over two epochs, whose steps are more from task to task."""
    config = small(strategy="from_scratch", epochs=2, log_every=1, optimizer__schedule="cosine")
    train_and_evaluate(config, tmp_path, devices=jax.devices()[:1], progress=False)
    rates = [[line["learning_rate"] for line in lines(tmp_path, "train") if line["task"] == task] for task in range(3)]
    assert 0 < len(rates[0]) < len(rates[1]) < len(rates[2])
    for found in rates:
        share = np.arange(len(found)) / len(found)
        np.testing.assert_allclose(found, 0.02 * (1 + np.cos(np.pi * share)) / 2, rtol=1e-4, atol=1e-7)


def test_a_full_class_accepts_candidates_of_a_batch():
    """2,000 rows of one class into its 500 places: once these are full, of 16 rows 4 are accepted in the mean."""
    config = small(strategy="er", buffer__capacity=5000, buffer__candidates=4)
    parts = build(config, jax.devices()[:1])
    buffer, insert = parts.buffer, jax.jit(parts.buffer.insert, donate_argnums=0)
    state, arrived = buffer.init(), 0
    accepted = []
    for step in range(125):
        ids = np.arange(arrived, arrived + 16, dtype=np.int32)
        rows = Rows({"image": np.zeros((16, 8, 8, 1), np.uint8)}, np.zeros(16, np.int32), ids, np.ones(16, bool))
        state = insert(state, mesh_lib.shard_rows(parts.mesh, rows), jax.random.key(step))
        arrived += 16
        if arrived > 512:  # full: of a batch those stay that are accepted and not overwritten by a later row of it
            accepted.append(np.isin(ids, np.asarray(state.id)).sum())
    assert buffer.stats(state)["rows"] == 500
    rows, share = 16 * len(accepted), 4 / 16
    # Five deviations of a binomial, and what is overwritten at once: pairs of a batch's accepted rows in one of 500 places.
    assert abs(sum(accepted) - share * rows) < 5 * np.sqrt(rows * share * (1 - share)) + len(accepted) * 6 / 500
