"""A task's exemplars: at its end the best of its rows enter the memory, in the mode that the memory has.

A choice is one over all devices, see `jaxcl.buffer.selection`, and the modes differ in how many are made and who stores them:

  sharded       one choice; the rows of a class are dealt to the shards in order of rank. The memory holds the same rows on any
                number of devices, but for the rounding of shares where capacity is no multiple of devices times classes.
  replicated    one choice, which every device stores whole.
  independent   a choice for every device, which it stores alone: DyTox's "distributed memory" (Douillard et al., CVPR 2022,
                and its erratum). Choices differ if their keys do, and only where something is random: features of augmented
                images, or the selection itself. Else all devices hold the same rows.

`ways` emulates the last on any number of devices, one included: a sharded memory of as many independent choices, each with
its part of the quota ("rehearsal modes" there). A row may then be stored several times, as it may on several devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows, Shard, Staged
from jaxcl.buffer.selection import UNRANKED, rank_rows
from jaxcl.data import Source
from jaxcl.errors import UserError
from jaxcl.mesh import AXIS, ROWS, WHOLE, on_mesh
from jaxcl.strategies.base import recent_classes
from jaxcl.training.learn import Bound
from jaxcl.training.state import TrainState, Weights, weights_specs
from jaxcl.types import Batch

Batches = Callable[[], Iterable[Batch]]
Chosen = dict[str, np.ndarray]  # rank, label and id of the rows of one choice, on the host


@dataclasses.dataclass(frozen=True)
class Selection:
    """How a task's exemplars are chosen: `config.buffer.selection`, with the memory they are for.

    Attributes:
      by: one of `jaxcl.buffer.selection.SELECTIONS`.
      features: of "clean" images, or of images "augmented" as in training.
      random_keys: whether several choices use the same random numbers ("shared") or each its own ("per_shard").
      quota: "adaptive": the classes seen so far share the whole memory; "fixed": each has capacity // (all classes), from the
        first task on.
      ways: choices made for a sharded memory; an independent one makes one for each device.
      memory: its mode.
      capacity: its rows, as `make_buffer` counts them.
    """

    by: str
    features: str = "clean"
    random_keys: str = "shared"
    quota: str = "adaptive"
    ways: int = 1
    memory: str = "sharded"
    capacity: int = 0

    @property
    def by_chance(self) -> bool:
        """Whether anything about a choice is random."""
        return self.by == "random" or self.features == "augmented"

    def wanted(self, seen: int, num_classes: int) -> int:
        """Rows that one choice offers of each class of a task; of an adaptive quota rounded up, as the memory keeps what
        fits.

        Raises:
          UserError: a fixed quota of none.
        """
        if self.quota == "adaptive":
            return -(-self.capacity // (seen * self.ways))
        if self.capacity < num_classes * self.ways:
            raise UserError(
                f"buffer.capacity: {self.capacity} rows are less than one for each of {num_classes} classes "
                f"and {self.ways} ways, which buffer.selection.quota = fixed needs"
            )
        return self.capacity // (num_classes * self.ways)


def make_store_exemplars(
    bound: Bound, source: Source, selection: Selection, *, batch_size: int
) -> Callable[[TrainState, int, jax.Array, Batches], TrainState]:
    """`store(state, task, key, batches) -> state` with the exemplars of the task in the memory, which gives up as many of its
    own, the last in rank first.

    `batches()` are this process's rows of the task, each row once, not augmented; `key` is for this task alone. The state
    passed in is used up.

    Args:
      source: where the rows that are chosen are read again.
      batch_size: rows that are inserted at once, over all devices, a multiple of their number.

    Raises:
      UserError: see `Selection.wanted`.
    """
    mesh, apart = bound.mesh, selection.random_keys == "per_shard"
    choices = mesh_lib.row_shards(mesh) if selection.memory == "independent" else selection.ways
    seen = np.logical_or.accumulate(bound.classes)
    kept = recent_classes(bound.classes, bound.strategy.recent or len(bound.classes))  # of which the memory holds rows
    quotas = [selection.wanted(int(n), bound.classes.shape[1]) for n in kept.sum(axis=1)]  # of each task
    laid = weights_specs(bound.layout)
    describe_rows = on_mesh(mesh, functools.partial(describe, bound, selection), (laid, WHOLE, ROWS), ROWS)
    rank_all = on_mesh(mesh, functools.partial(rank, bound, selection), (WHOLE, WHOLE, ROWS), ROWS)
    insert_rows = on_mesh(mesh, functools.partial(insert, bound), (laid, ROWS, ROWS), ROWS, donate=1)
    drop_rows = on_mesh(mesh, functools.partial(drop, bound), (ROWS, ROWS, WHOLE), (ROWS, ROWS), donate=(0, 1))

    def choose(weights: Weights, task: int, key: jax.Array, batches: Batches) -> Chosen:
        """The rows of one choice."""
        key_data = mesh_lib.replicate(mesh, np.asarray(jax.random.key_data(key)))
        quota = mesh_lib.replicate(mesh, np.int32(quotas[task]))
        parts = [describe_rows(weights, key_data, mesh_lib.shard_rows(mesh, batch)) for batch in batches()]
        ranked = rank_all(quota, key_data, parts)
        found = {name: np.asarray(multihost_utils.process_allgather(x, tiled=True)) for name, x in ranked.items()}
        return {name: x[found["rank"] != UNRANKED] for name, x in found.items()}

    def store(state: TrainState, task: int, key: jax.Array, batches: Batches) -> TrainState:
        shard, staged, weights = state.buffer, state.staged, state.weights
        assert shard is not None
        if (gone := seen[task] & ~kept[task]).any():
            shard, staged = drop_rows(shard, staged, mesh_lib.replicate(mesh, gone))
        keys = [jax.random.fold_in(key, choice) for choice in range(choices)] if apart else [key] * choices
        if apart and selection.by_chance:
            chosen = [choose(weights, task, one, batches) for one in keys]
        else:  # choices that cannot differ are made once
            chosen = [choose(weights, task, keys[0], batches)] * choices
        lists = rows_of_devices(bound, selection.memory, chosen, shard)
        for batch in deal(source, lists, batch_size):
            shard = insert_rows(weights, shard, mesh_lib.shard_rows(mesh, batch))
        return dataclasses.replace(state, buffer=shard, staged=staged)

    return store


# --- the programs, on a device's part of everything; keys as their data, as they come from the host ------------------


def describe(bound: Bound, selection: Selection, weights: Weights, key: jax.Array, batch: Batch) -> Batch:
    """The features of rows, by which they are chosen, with their label, id and validity."""
    rows = {name: batch[name] for name in ("label", "valid", "id")}
    if selection.by == "random":
        return {"features": jnp.zeros((len(batch["id"]), 0)), **rows}
    params, batch_stats, own, task = weights
    if selection.by_chance:
        images = bound.augment(jax.random.wrap_key_data(key), batch["id"], batch["image"])
    else:
        images = bound.normalize(batch["image"])
    outputs = bound.predict(params, batch_stats, images)
    return {"features": bound.strategy.features(outputs, bound.context(own, task)), **rows}


def rank(bound: Bound, selection: Selection, quota: jax.Array, key: jax.Array, parts: list[Batch]) -> Batch:
    """The rank of every row in its class, `UNRANKED` for those that are not chosen, with its label and id."""
    rows = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    described = [rows[name] for name in ("features", "label", "valid", "id")]
    options: Any = {"num_classes": bound.classes.shape[1], "quota": quota, "axis": AXIS}
    found = rank_rows(selection.by, jax.random.wrap_key_data(key), *described, **options)
    return {"rank": found, "label": rows["label"], "id": rows["id"]}


def drop(bound: Bound, shard: Shard, staged: Staged, gone: jax.Array) -> tuple[Shard, Staged]:
    """The memory, and the draws that wait, without the rows of the classes `gone`, bool `[K]`."""
    assert bound.buffer is not None
    staged = tuple(dataclasses.replace(one, valid=one.valid & ~gone[one.label]) for one in staged)
    return bound.buffer.local.drop_classes(shard, gone), staged


def insert(bound: Bound, weights: Weights, shard: Shard, batch: Batch) -> Shard:
    """The memory with the rows that this device is given."""
    assert bound.buffer is not None
    outputs = bound.predict(weights.params, weights.batch_stats, bound.normalize(batch["image"]))
    record = bound.strategy.record(batch["image"], outputs)
    rows = Rows(record, batch["label"], batch["id"], batch["valid"])
    return bound.buffer.local.keep(shard, rows, jax.random.key(0))  # herding draws nothing


# --- who stores what -------------------------------------------------------------------------------------------------


def rows_of_devices(bound: Bound, memory: str, chosen: Sequence[Chosen], shard: Shard) -> list[np.ndarray]:
    """The ids that each device stores, in order; a sharded memory goes on at the shard that is next in turn."""
    devices = mesh_lib.row_shards(bound.mesh)
    if memory == "independent":
        return [in_turn([one]) for one in chosen]
    ids = in_turn(chosen)
    if memory == "replicated":
        return [ids] * devices
    assert bound.buffer is not None
    stored = bound.buffer.stats(shard)["rows"]
    return [ids[(device - stored) % devices :: devices] for device in range(devices)]


def in_turn(chosen: Sequence[Chosen]) -> np.ndarray:
    """Ids class by class, so that every shard has its part of each, and within a class by rank, the choices in turn."""
    rows = {name: np.concatenate([one[name] for one in chosen]) for name in ("rank", "label", "id")}
    choice = np.repeat(np.arange(len(chosen)), [len(one["id"]) for one in chosen])
    return rows["id"][np.lexsort((choice, rows["rank"], rows["label"]))]


def deal(source: Source, lists: Sequence[np.ndarray], batch_size: int) -> Iterator[Batch]:
    """Batches of rows of the source, this process's slice of each; `lists` are the rows of each device, in order."""
    each = batch_size // len(lists)
    batches = -(-max(map(len, lists)) // each)
    padded = np.full((len(lists), batches * each), -1, np.int64)
    for rows, ids in zip(padded, lists, strict=True):
        rows[: len(ids)] = ids
    dealt = padded.reshape(len(lists), batches, each).swapaxes(0, 1).reshape(batches, jax.process_count(), -1)
    for number in dealt[:, jax.process_index()]:
        valid = number >= 0
        image = np.zeros((len(number), *source.image_shape), np.uint8)
        image[valid] = source.read(number[valid])
        label = np.where(valid, source.labels[number], 0)
        yield {"image": image, "label": label.astype(np.int32), "id": number.astype(np.int32), "valid": valid}
