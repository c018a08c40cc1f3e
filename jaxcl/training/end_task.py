"""What a strategy does when a task ends: a pass over rows, summed over all devices, then a function of the sums."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Shard
from jaxcl.mesh import AXIS, ROWS, WHOLE, on_mesh
from jaxcl.strategies import End, Part
from jaxcl.training.given import Numbers, make_given
from jaxcl.training.learn import Bound, allowed_classes
from jaxcl.training.state import TrainState, Weights, weights_specs
from jaxcl.types import Batch, PyTree

Batches = Callable[[], Iterable[Batch]]
CHUNK = 256  # rows of the buffer that a device visits at once


def make_end_task(bound: Bound) -> Callable[[TrainState, Batches], TrainState]:
    """`end_task(state, batches) -> state`, what the strategy makes of weights and its own state at a task's end.

    `batches()` are this process's rows of the task, each row once, not augmented; they are read only if the strategy
    visits the task's rows. The state passed in is used up.
    """
    mesh, visit = bound.mesh, visit_shard if bound.strategy.visits == "buffer" else visit_batch
    numbers = make_given(mesh, 0, bound.numbers).numbers
    weights_in = (WHOLE, weights_specs(bound.layout), WHOLE, ROWS)
    add = on_mesh(mesh, functools.partial(with_numbers, visit, bound), weights_in, WHOLE, donate=2)
    outside = dataclasses.replace(bound, layout=None)  # of programs on whole arrays, which the compiler divides
    out = WHOLE if bound.layout is None else (bound.layout.params, bound.layout.strategy_state)
    conclude = jax.jit(functools.partial(with_numbers, finish, outside), out_shardings=mesh_lib.shardings(mesh, out))

    def end_task(state: TrainState, batches: Batches) -> TrainState:
        for _ in range(bound.strategy.rounds):
            weights, visited = state.weights, None
            for rows, like in to_visit(bound, state, batches):
                if visited is None:
                    shapes = jax.eval_shape(functools.partial(visit_rows, outside), weights, like)
                    visited = mesh_lib.replicate(mesh, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
                visited = add(numbers, weights, visited, rows)
            params, own = conclude(numbers, weights, visited)
            state = dataclasses.replace(state, params=params, strategy_state=own)
        return state

    return end_task


def with_numbers(function: Callable, bound: Bound, numbers: Numbers, *args: PyTree) -> PyTree:
    """`function(bound, *args)`, with these numbers in the place of those of the config."""
    return function(bound.rebind(bound, numbers), *args)


def to_visit(bound: Bound, state: TrainState, batches: Batches) -> Iterable[tuple[Shard | Batch, Batch]]:
    """What the strategy visits, part after part on the devices, each with a batch of rows of the same shapes."""
    if bound.strategy.visit is None:
        return
    if bound.strategy.visits == "task":
        for batch in batches():
            yield mesh_lib.shard_rows(bound.mesh, batch), batch
        return
    assert state.buffer is not None, "the strategy visits the buffer and has none"
    stored = stored_rows(state.buffer) | {"valid": np.zeros(1, bool)}
    yield state.buffer, {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in stored.items()}


def visit_rows(bound: Bound, weights: Weights, rows: Batch) -> PyTree:
    """What the strategy gathers from rows of this device."""
    assert bound.strategy.visit is not None
    params, batch_stats, own, task = weights
    context = bound.context(own, task)
    allowed = allowed_classes(bound, rows["label"], context)
    read = bound.recalled if bound.strategy.visits == "buffer" else bound.normalize
    part = Part(read(rows["image"]), rows["label"], rows["valid"], rows["id"], allowed=allowed)
    return bound.strategy.visit(bound.whole(params), batch_stats, part, context)


def visit_batch(bound: Bound, weights: Weights, total: PyTree, batch: Batch) -> PyTree:
    """`total`, and what a batch adds to it over all devices."""
    return _add(total, lax.psum(visit_rows(bound, weights, batch), AXIS))


def visit_shard(bound: Bound, weights: Weights, total: PyTree, shard: Shard) -> PyTree:
    """`total`, and what the rows of the buffer add to it over all devices."""
    slots = len(shard.id)
    size = min(CHUNK, slots)

    def chunk(i: jax.Array, sums: PyTree) -> PyTree:
        slot = i * size + jnp.arange(size)
        rows = {name: x.at[slot].get(mode="clip") for name, x in stored_rows(shard).items()}
        return _add(sums, visit_rows(bound, weights, rows | {"valid": (slot < slots) & (rows["id"] >= 0)}))

    sums = lax.fori_loop(0, -(-slots // size), chunk, jax.tree.map(jnp.zeros_like, total))
    return _add(total, lax.psum(sums, AXIS))


def stored_rows(shard: Shard) -> Batch:
    return {"image": shard.record["image"], "label": shard.label, "id": shard.id}


def finish(bound: Bound, weights: Weights, visited: PyTree) -> tuple[PyTree, PyTree]:
    """The parameters and the strategy's own state after the task."""
    assert bound.strategy.end_task is not None
    params, batch_stats, own, task = weights
    done = bound.strategy.end_task(End(params, batch_stats, visited, bound.context(own, task)))
    return jax.tree.map(jnp.copy, done)  # the next step donates both: they must not share memory


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)
