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
from jaxcl.training.state import TrainState
from jaxcl.training.step import make_context
from jaxcl.types import PyTree

Batches = Callable[[], Iterable[dict[str, np.ndarray]]]
CHUNK = 256  # rows of the buffer that a device visits at once


def make_end_task(
    mesh: Mesh,
    model: Model,
    strategy: Strategy,
    normalize: Callable[[jax.Array], jax.Array],
    classes: np.ndarray,
) -> Callable[[TrainState, Batches], TrainState]:
    """`end_task(state, batches) -> state`, what the strategy makes of weights and its own state at a task's end.

    `batches()` are this process's rows of the task, each row once, not augmented; they are read only if the strategy
    visits the task's rows. The state passed in is used up.
    """
    if strategy.end_task is None:
        return lambda state, batches: state
    visit, end_task = strategy.visit, strategy.end_task

    def visit_part(weights: PyTree, rows: dict[str, jax.Array]) -> PyTree:
        assert visit is not None
        params, batch_stats, own, task = weights
        part = Part(normalize(rows["image"]), rows["label"], rows["valid"], rows["id"])
        return visit(params, batch_stats, part, make_context(model, own, task, classes))

    def visit_batch(weights: PyTree, total: PyTree, batch: dict[str, jax.Array]) -> PyTree:
        return _add(total, lax.psum(visit_part(weights, batch), AXIS))

    def visit_shard(weights: PyTree, total: PyTree, shard: Shard) -> PyTree:
        slots = len(shard.id)
        size = min(CHUNK, slots)

        def chunk(i, sums):
            slot = i * size + jnp.arange(size)
            stored = {"image": shard.record["image"], "label": shard.label, "id": shard.id}
            rows = {name: x.at[slot].get(mode="clip") for name, x in stored.items()}
            return _add(sums, visit_part(weights, rows | {"valid": (slot < slots) & (rows["id"] >= 0)}))

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
        shapes = jax.eval_shape(visit_part, weights, batch)
        return mesh_lib.replicate(mesh, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))

    def turn(state: TrainState, batches: Batches) -> TrainState:
        weights = (state.params, state.batch_stats, state.strategy_state, state.task)
        visited = None
        if visit is not None and strategy.visits == "buffer":
            assert state.buffer is not None, "the strategy visits the buffer and has none"
            image = state.buffer.record["image"]
            rows = {"image": image.dtype, "label": np.int32, "id": np.int32, "valid": bool}
            shapes = {"image": image.shape[1:]}
            spec = {name: jax.ShapeDtypeStruct((1, *shapes.get(name, ())), dtype) for name, dtype in rows.items()}
            visited = visit_buffer(weights, zeros(weights, spec), state.buffer)
        elif visit is not None:
            for batch in batches():
                if visited is None:
                    visited = zeros(weights, batch)
                visited = visit_task(weights, visited, mesh_lib.shard_rows(mesh, batch))
        params, own = finish(weights, visited)
        return dataclasses.replace(state, params=params, strategy_state=own)

    def run(state: TrainState, batches: Batches) -> TrainState:
        for _ in range(strategy.rounds):
            state = turn(state, batches)
        return state

    return run


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)
