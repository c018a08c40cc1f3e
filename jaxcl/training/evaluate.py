"""Exact evaluation over devices and processes: every test row counts once, padding not at all."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxcl import losses
from jaxcl import mesh as mesh_lib
from jaxcl.data import Scenario
from jaxcl.mesh import AXIS
from jaxcl.models import Model

PyTree = Any
Counts = dict[str, jax.Array]
_BY_TASK = ("accuracy", "top5", "accuracy_in_task")


def make_evaluate(
    mesh: Mesh,
    model: Model,
    normalize: Callable[[jax.Array], jax.Array],
    scenario: Scenario,
    scores: Callable[[dict[str, jax.Array], PyTree], jax.Array],
    *,
    seeds: bool = False,
) -> Callable[[PyTree, PyTree, PyTree, Iterable[dict[str, np.ndarray]]], dict[str, np.ndarray]]:
    """`evaluate(params, batch_stats, strategy_state, batches) -> scores`, each task's test rows apart:

    accuracy, top5: [T]; accuracy_in_task: [T], where only the classes of the row's task are candidates (task-incremental);
    confusion: int32 [K, K], test rows by label and by the class ranked first.

    Args:
      normalize: uint8 images to the model's input.
      scenario: tells the task of each test row, and each task's classes.
      scores: `(outputs, strategy_state) -> [b, K]`, by which the classes of a row are ranked.
      seeds: params, batch_stats and strategy_state have a leading axis of seeds, and so has every score.
    """
    tasks, num_classes = scenario.class_table.shape
    task_of_row = scenario.task_of_test_row

    def count(
        params: PyTree, batch_stats: PyTree, strategy_state: PyTree, counts: Counts, batch: dict[str, jax.Array]
    ) -> Counts:
        outputs, _ = model.apply(params, batch_stats, normalize(batch["image"]), train=False)
        logits, label = scores(outputs, strategy_state), batch["label"]
        in_task = (batch["task"][:, None] == jnp.arange(tasks)[None, :]) & batch["valid"][:, None]
        its_classes = jnp.asarray(scenario.class_table)[batch["task"]]
        correct = {
            "rows": batch["valid"],
            "accuracy": losses.topk_correct(logits, label),
            "top5": losses.topk_correct(logits, label, 5),
            "accuracy_in_task": losses.topk_correct(logits, label, class_mask=its_classes),
        }
        now = {name: jnp.sum(in_task & x[:, None], axis=0, dtype=jnp.int32) for name, x in correct.items()}
        zeros = jnp.zeros((num_classes, num_classes), jnp.int32)
        now["confusion"] = zeros.at[label, jnp.argmax(logits, axis=1)].add(batch["valid"].astype(jnp.int32))
        return jax.tree.map(jnp.add, counts, lax.psum(now, AXIS))

    counted = jax.vmap(count, (0, 0, 0, 0, None)) if seeds else count
    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    step = jax.jit(
        jax.shard_map(
            counted, mesh=mesh, in_specs=(whole, whole, whole, whole, split), out_specs=whole, check_vma=False
        ),
        donate_argnums=3,
    )

    def evaluate(
        params: PyTree, batch_stats: PyTree, strategy_state: PyTree, batches: Iterable[dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        shapes = dict.fromkeys(("rows", *_BY_TASK), (tasks,)) | {"confusion": (num_classes, num_classes)}
        lead = jax.tree.leaves(params)[0].shape[:1] if seeds else ()
        counts = mesh_lib.replicate(mesh, {name: np.zeros(lead + shape, np.int32) for name, shape in shapes.items()})
        for batch in batches:
            inputs = {name: batch[name] for name in ("image", "label", "valid")}
            inputs["task"] = task_of_row[batch["id"]]  # that of padding, whose id is -1, does not count
            counts = step(params, batch_stats, strategy_state, counts, mesh_lib.shard_rows(mesh, inputs))
        found = jax.device_get(counts)
        return {name: found[name] / found["rows"] for name in _BY_TASK} | {"confusion": found["confusion"]}

    return evaluate
