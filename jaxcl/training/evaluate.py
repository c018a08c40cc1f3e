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
from jaxcl.mesh import AXIS
from jaxcl.models import Model

PyTree = Any
Counts = dict[str, jax.Array]


def make_evaluate(
    mesh: Mesh, model: Model, normalize: Callable[[jax.Array], jax.Array], task_of_class: np.ndarray
) -> Callable[[PyTree, PyTree, Iterable[dict[str, np.ndarray]]], dict[str, np.ndarray]]:
    """`evaluate(params, batch_stats, batches) -> {"accuracy": [T], "top5": [T]}`, each task's test rows scored apart.

    Args:
      normalize: uint8 images to the model's input.
      task_of_class: int32 [K], the task of each class, -1 for none.
    """
    tasks = int(task_of_class.max()) + 1
    task_of = jnp.asarray(task_of_class)

    def count(params: PyTree, batch_stats: PyTree, counts: Counts, batch: dict[str, jax.Array]) -> Counts:
        outputs, _ = model.apply(params, batch_stats, normalize(batch["image"]), train=False)
        logits, label = outputs["logits"], batch["label"]
        in_task = (task_of[label][:, None] == jnp.arange(tasks)[None, :]) & batch["valid"][:, None]
        now = {
            "rows": in_task,
            "accuracy": in_task & losses.topk_correct(logits, label)[:, None],
            "top5": in_task & losses.topk_correct(logits, label, 5)[:, None],
        }
        summed = lax.psum({name: jnp.sum(x, axis=0, dtype=jnp.int32) for name, x in now.items()}, AXIS)
        return jax.tree.map(jnp.add, counts, summed)

    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    step = jax.jit(
        jax.shard_map(count, mesh=mesh, in_specs=(whole, whole, whole, split), out_specs=whole, check_vma=False),
        donate_argnums=2,
    )

    def evaluate(
        params: PyTree, batch_stats: PyTree, batches: Iterable[dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        zeros = {name: np.zeros(tasks, np.int32) for name in ("rows", "accuracy", "top5")}
        counts = mesh_lib.replicate(mesh, zeros)
        for batch in batches:
            inputs = {name: batch[name] for name in ("image", "label", "valid")}
            counts = step(params, batch_stats, counts, mesh_lib.shard_rows(mesh, inputs))
        found = jax.device_get(counts)
        return {name: found[name] / found["rows"] for name in ("accuracy", "top5")}

    return evaluate
