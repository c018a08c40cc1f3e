"""What a strategy does when a task ends: a pass over rows, summed over all devices, then a function of the sums."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Shard
from jaxcl.mesh import AXIS
from jaxcl.models import Model
from jaxcl.strategies import End, Part, Strategy
from jaxcl.training.state import PyTree, TrainState
from jaxcl.training.step import make_context

CHUNK = 256  # rows of the buffer that a device visits at once


def make_end_task(
    mesh: Mesh,
    model: Model,
    strategy: Strategy,
    normalize: Callable[[jax.Array], jax.Array],
    classes: np.ndarray,
) -> Callable[[TrainState, Iterable[dict[str, np.ndarray]]], TrainState]:
    """`end_task(state, batches) -> state`, what the strategy makes of weights and its own state at a task's end.

    `batches` are this process's rows of the task, each row once, not augmented; they are read only if the strategy
    visits the task's rows. The state passed in is used up.
    """
    if strategy.end_task is None:
        return lambda state, batches: state
    visit, end_task = strategy.visit, strategy.end_task

    def visit_part(weights: PyTree, image: jax.Array, label: jax.Array, valid: jax.Array) -> PyTree:
        assert visit is not None
        params, batch_stats, own, task = weights
        return visit(params, batch_stats, Part(normalize(image), label, valid), make_context(model, own, task, classes))

    def visit_batch(weights: PyTree, total: PyTree, batch: dict[str, jax.Array]) -> PyTree:
        return _add(total, lax.psum(visit_part(weights, batch["image"], batch["label"], batch["valid"]), AXIS))

    def visit_shard(weights: PyTree, total: PyTree, shard: Shard) -> PyTree:
        slots = len(shard.id)
        size = min(CHUNK, slots)

        def chunk(i, sums):
            slot = i * size + jnp.arange(size)
            image, label, ident = (x.at[slot].get(mode="clip") for x in (shard.record["image"], shard.label, shard.id))
            return _add(sums, visit_part(weights, image, label, (slot < slots) & (ident >= 0)))

        sums = lax.fori_loop(0, -(-slots // size), chunk, jax.tree.map(jnp.zeros_like, total))
        return _add(total, lax.psum(sums, AXIS))

    def finish(weights: PyTree, visited: PyTree) -> tuple[PyTree, PyTree]:
        params, batch_stats, own, task = weights
        done = end_task(End(params, batch_stats, visited, make_context(model, own, task, classes)))
        return jax.tree.map(jnp.copy, done)  # the next step donates both: they must not share memory

    whole, split = PartitionSpec(), PartitionSpec(AXIS)

    def over_mesh(function: Callable) -> Callable:
        specs = (whole, whole, split)
        return jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False), donate_argnums=1
        )

    finish = jax.jit(finish, out_shardings=mesh_lib.replicated(mesh))
    visit_task, visit_buffer = over_mesh(visit_batch), over_mesh(visit_shard)

    def zeros(weights: PyTree, batch: dict[str, Any]) -> PyTree:
        shapes = jax.eval_shape(visit_part, weights, batch["image"], batch["label"], batch["valid"])
        return mesh_lib.replicate(mesh, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))

    def run(state: TrainState, batches: Iterable[dict[str, np.ndarray]]) -> TrainState:
        weights = (state.params, state.batch_stats, state.strategy_state, state.task)
        visited = None
        if visit is not None and strategy.visits == "buffer":
            assert state.buffer is not None, "the strategy visits the buffer and has none"
            image = state.buffer.record["image"]
            rows = {"image": (image.shape[1:], image.dtype), "label": ((), np.int32), "valid": ((), bool)}
            spec = {name: jax.ShapeDtypeStruct((1, *shape), dtype) for name, (shape, dtype) in rows.items()}
            visited = visit_buffer(weights, zeros(weights, spec), state.buffer)
        elif visit is not None:
            for batch in batches:
                inputs = {name: batch[name] for name in ("image", "label", "valid")}
                if visited is None:
                    visited = zeros(weights, inputs)
                visited = visit_task(weights, visited, mesh_lib.shard_rows(mesh, inputs))
        params, own = finish(weights, visited)
        return dataclasses.replace(state, params=params, strategy_state=own)

    return run


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)
