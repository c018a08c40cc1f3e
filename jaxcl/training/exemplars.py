"""A task's exemplars: at its end the best of its rows, by herding on the model's features, enter the memory.

The choice is one over all devices, and the rows of a class are dealt to the shards in order of rank, so the memory holds the
same rows on any number of devices, but for the rounding of shares where capacity is no multiple of devices times classes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Buffer, Rows, Shard, herding
from jaxcl.data import Source
from jaxcl.mesh import AXIS
from jaxcl.models import Model
from jaxcl.strategies import Strategy
from jaxcl.training.state import PyTree, TrainState

Batch = dict[str, Any]


def make_store_exemplars(
    mesh: Mesh,
    model: Model,
    strategy: Strategy,
    buffer: Buffer,
    normalize: Callable[[jax.Array], jax.Array],
    source: Source,
    classes: np.ndarray,
    *,
    batch_size: int,
    sharded: bool,
) -> Callable[[TrainState, int, Iterable[Batch]], TrainState]:
    """`store(state, task, batches) -> state` with the exemplars of the task in the memory, which gives up as many of its
    own, the last in rank first. Of each class capacity / (classes seen so far) rows are offered, rounded up.

    `batches` are this process's rows of the task, each row once, not augmented. The state passed in is used up.

    Args:
      source: where the rows that are chosen are read again.
      classes: bool `[T, K]`, the classes of each task.
      batch_size: rows that are inserted at once, over all devices, a multiple of their number.
      sharded: whether the shards divide the rows; else each is given all of them.
    """
    assert strategy.exemplars is not None
    exemplars = strategy.exemplars
    seen = np.logical_or.accumulate(classes).sum(axis=1)
    whole, split = PartitionSpec(), PartitionSpec(AXIS)

    def over_mesh(function: Callable, *specs: PartitionSpec, donate: tuple[int, ...] = ()) -> Callable:
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
        return jax.jit(mapped, donate_argnums=donate)

    def describe(params: PyTree, batch_stats: PyTree, batch: Batch) -> Batch:
        outputs, _ = model.apply(params, batch_stats, normalize(batch["image"]), train=False)
        return {"features": exemplars(outputs), **{name: batch[name] for name in ("label", "valid", "id")}}

    def rank(quota: jax.Array, parts: list[Batch]) -> Batch:
        rows = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        features, label, valid = rows["features"].astype(jnp.float32), rows["label"], rows["valid"]
        means = herding.class_means(features, label, valid, classes.shape[1], AXIS)
        found = herding.herd(means, features, label, valid, rows["id"], quota, AXIS)
        return {"rank": found, "label": label, "id": rows["id"]}

    def insert(params: PyTree, batch_stats: PyTree, shard: Shard, batch: Batch) -> Shard:
        outputs, _ = model.apply(params, batch_stats, normalize(batch["image"]), train=False)
        rows = Rows(strategy.record(batch["image"], outputs), batch["label"], batch["id"], batch["valid"])
        return buffer.local.insert(shard, rows, jax.random.key(0))  # herding draws nothing

    describe = over_mesh(describe, whole, whole, split)
    rank = over_mesh(rank, whole, split)
    insert = over_mesh(insert, whole, whole, split, split, donate=(2,))

    def store(state: TrainState, task: int, batches: Iterable[Batch]) -> TrainState:
        assert state.buffer is not None
        weights, shard = (state.params, state.batch_stats), state.buffer
        parts = [describe(*weights, mesh_lib.shard_rows(mesh, batch)) for batch in batches]
        quota = -(-buffer.capacity // int(seen[task]))
        ranked = rank(mesh_lib.replicate(mesh, np.int32(quota)), parts)
        ranked = {name: np.asarray(multihost_utils.process_allgather(x, tiled=True)) for name, x in ranked.items()}
        order = np.lexsort(
            (ranked["rank"], ranked["label"])
        )  # class by class, so that every shard has its part of each
        chosen = ranked["id"][order][ranked["rank"][order] != herding.UNRANKED]
        for batch in deal(source, chosen, batch_size, mesh.size if sharded else 1):
            shard = insert(*weights, shard, mesh_lib.shard_rows(mesh, batch))
        return dataclasses.replace(state, buffer=shard)

    return store


def deal(source: Source, rows: np.ndarray, batch_size: int, shards: int) -> Iterator[Batch]:
    """Batches of these rows of the source, this process's slice of each; row i of the list goes to device i mod `shards`."""
    batches = -(-len(rows) // batch_size)
    padded = np.full(batches * batch_size, -1, np.int64)
    padded[: len(rows)] = rows
    dealt = padded.reshape(batches, -1, shards).swapaxes(1, 2).reshape(batches, jax.process_count(), -1)
    for number in dealt[:, jax.process_index()]:
        valid = number >= 0
        image = np.zeros((len(number), *source.image_shape), np.uint8)
        image[valid] = source.read(number[valid])
        label = np.where(valid, source.labels[number], 0)
        yield {"image": image, "label": label.astype(np.int32), "id": number.astype(np.int32), "valid": valid}
