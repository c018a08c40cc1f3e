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
from jaxcl.types import PyTree

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
    reconstructs: bool = False,
) -> Callable[[PyTree, PyTree, PyTree, Iterable[dict[str, np.ndarray]]], dict[str, np.ndarray]]:
    """`evaluate(params, batch_stats, strategy_state, batches) -> scores`, each task's test rows apart. Of classification

    accuracy, top5: [T]; accuracy_in_task: [T], where only the classes of the row's task are candidates (task-incremental);
    confusion: int32 [K, K], test rows by label and by the class ranked first;

    of reconstruction error: [T], the mean of `losses.reconstruction_error`.

    Args:
      normalize: uint8 images to the model's input.
      scenario: tells the task of each test row, and each task's classes.
      scores: `(outputs, strategy_state) -> [b, K]`, by which the classes of a row are ranked.
      seeds: params, batch_stats and strategy_state have a leading axis of seeds, and so has every score.
      reconstructs: whether the batches hold a "target" that the model reconstructs, instead of classifying.
    """
    tasks, num_classes = scenario.class_table.shape
    task_of_row = scenario.task_of_test_row
    by_task = ("error",) if reconstructs else _BY_TASK
    zeros: dict[str, np.ndarray] = {name: np.zeros(tasks, np.int32) for name in ("rows", *by_task)}
    if reconstructs:
        zeros["error"] = np.zeros(tasks, np.float32)
    else:
        zeros["confusion"] = np.zeros((num_classes, num_classes), np.int32)

    def count(
        params: PyTree, batch_stats: PyTree, strategy_state: PyTree, counts: Counts, batch: dict[str, Any]
    ) -> Counts:
        outputs, _ = model.apply(params, batch_stats, normalize(batch["image"]), train=False)
        in_task = (batch["task"][:, None] == jnp.arange(tasks)[None, :]) & batch["valid"][:, None]
        of_row = {"rows": batch["valid"]}
        now = {}
        if reconstructs:
            of_row["error"] = losses.reconstruction_error(outputs, batch["target"])
        else:
            logits, label = scores(outputs, strategy_state), batch["label"]
            its_classes = jnp.asarray(scenario.class_table)[batch["task"]]
            of_row["accuracy"] = losses.topk_correct(logits, label)
            of_row["top5"] = losses.topk_correct(logits, label, 5)
            of_row["accuracy_in_task"] = losses.topk_correct(logits, label, class_mask=its_classes)
            confusion = jnp.zeros((num_classes, num_classes), jnp.int32)
            now["confusion"] = confusion.at[label, jnp.argmax(logits, axis=1)].add(batch["valid"].astype(jnp.int32))
        now |= {name: jnp.sum(jnp.where(in_task, x[:, None], 0), axis=0) for name, x in of_row.items()}
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
        lead = jax.tree.leaves(params)[0].shape[:1] if seeds else ()
        counts = mesh_lib.replicate(mesh, {name: np.zeros(lead + x.shape, x.dtype) for name, x in zeros.items()})
        for batch in batches:
            inputs: dict[str, Any] = {k: batch[k] for k in ("image", "label", "valid", "target") if k in batch}
            inputs["task"] = task_of_row[batch["id"]]  # that of padding, whose id is -1, does not count
            counts = step(params, batch_stats, strategy_state, counts, mesh_lib.shard_rows(mesh, inputs))
        found = jax.device_get(counts)
        confusion = {} if reconstructs else {"confusion": found["confusion"]}
        return {name: found[name] / found["rows"] for name in by_task} | confusion

    return evaluate
