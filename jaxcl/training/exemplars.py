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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Buffer, Rows, Shard
from jaxcl.buffer.selection import UNRANKED, rank_rows
from jaxcl.data import Source
from jaxcl.data.augment import Augment
from jaxcl.errors import UserError
from jaxcl.mesh import AXIS
from jaxcl.models import Model
from jaxcl.strategies import Strategy
from jaxcl.training.state import TrainState
from jaxcl.training.step import make_context
from jaxcl.types import PyTree

Batch = dict[str, Any]
Batches = Callable[[], Iterable[Batch]]


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
    mesh: Mesh,
    model: Model,
    strategy: Strategy,
    buffer: Buffer,
    augment: Augment,
    normalize: Callable[[jax.Array], jax.Array],
    source: Source,
    classes: np.ndarray,
    selection: Selection,
    *,
    batch_size: int,
) -> Callable[[TrainState, int, jax.Array, Batches], TrainState]:
    """`store(state, task, key, batches) -> state` with the exemplars of the task in the memory, which gives up as many of its
    own, the last in rank first.

    `batches()` are this process's rows of the task, each row once, not augmented; `key` is for this task alone. The state
    passed in is used up.

    Args:
      augment, normalize: what features are made of, see `Selection.features`.
      source: where the rows that are chosen are read again.
      classes: bool `[T, K]`, the classes of each task.
      batch_size: rows that are inserted at once, over all devices, a multiple of their number.

    Raises:
      UserError: see `Selection.wanted`.
    """
    seen = np.logical_or.accumulate(classes).sum(axis=1)
    quotas = [selection.wanted(int(n), classes.shape[1]) for n in seen]
    apart = selection.memory == "independent"
    choices = mesh.size if apart else selection.ways
    random = selection.by == "random" or selection.features == "augmented"
    whole, split = PartitionSpec(), PartitionSpec(AXIS)

    def over_mesh(function: Callable, *specs: PartitionSpec, donate: tuple[int, ...] = ()) -> Callable:
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
        return jax.jit(mapped, donate_argnums=donate)

    def describe(weights: PyTree, key: jax.Array, batch: Batch) -> Batch:
        rows = {name: batch[name] for name in ("label", "valid", "id")}
        if selection.by == "random":
            return {"features": jnp.zeros((len(batch["id"]), 0)), **rows}
        params, batch_stats, own, task = weights
        images = (
            augment(jax.random.wrap_key_data(key), batch["id"], batch["image"]) if random else normalize(batch["image"])
        )
        outputs, _ = model.apply(params, batch_stats, images, train=False)
        return {"features": strategy.features(outputs, make_context(model, own, task, classes)), **rows}

    def rank(quota: jax.Array, key: jax.Array, parts: list[Batch]) -> Batch:
        rows = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        described = [rows[name] for name in ("features", "label", "valid", "id")]
        key, num_classes = jax.random.wrap_key_data(key), classes.shape[1]
        found = rank_rows(selection.by, key, *described, num_classes=num_classes, quota=quota, axis=AXIS)
        return {"rank": found, "label": rows["label"], "id": rows["id"]}

    def insert(weights: PyTree, shard: Shard, batch: Batch) -> Shard:
        params, batch_stats, *_ = weights
        outputs, _ = model.apply(params, batch_stats, normalize(batch["image"]), train=False)
        rows = Rows(strategy.record(batch["image"], outputs), batch["label"], batch["id"], batch["valid"])
        return buffer.local.keep(shard, rows, jax.random.key(0))  # herding draws nothing

    describe = over_mesh(describe, whole, whole, split)
    rank = over_mesh(rank, whole, whole, split)
    insert = over_mesh(insert, whole, split, split, donate=(1,))

    def choose(weights: PyTree, task: int, key: Any, batches: Batches) -> dict[str, np.ndarray]:
        """The rows of one choice, on the host: rank, label and id of each."""
        key = mesh_lib.replicate(mesh, np.asarray(jax.random.key_data(key)))
        parts = [describe(weights, key, mesh_lib.shard_rows(mesh, batch)) for batch in batches()]
        ranked = rank(mesh_lib.replicate(mesh, np.int32(quotas[task])), key, parts)
        found = {name: np.asarray(multihost_utils.process_allgather(x, tiled=True)) for name, x in ranked.items()}
        return {name: x[found["rank"] != UNRANKED] for name, x in found.items()}

    def store(state: TrainState, task: int, key: jax.Array, batches: Batches) -> TrainState:
        assert state.buffer is not None
        weights, shard = (state.params, state.batch_stats, state.strategy_state, state.task), state.buffer
        chosen: list[dict[str, np.ndarray]] = []
        for choice in range(choices):
            if choice and not (random and selection.random_keys == "per_shard"):
                chosen.append(chosen[0])
                continue
            own = jax.random.fold_in(key, choice) if selection.random_keys == "per_shard" else key
            chosen.append(choose(weights, task, own, batches))
        if apart:
            lists = [in_turn([one]) for one in chosen]
        elif selection.memory == "replicated":
            lists = [in_turn(chosen)] * mesh.size
        else:  # from the shard that is next in turn
            ids, stored = in_turn(chosen), buffer.stats(shard)["rows"]
            lists = [ids[(device - stored) % mesh.size :: mesh.size] for device in range(mesh.size)]
        for batch in deal(source, lists, batch_size):
            shard = insert(weights, shard, mesh_lib.shard_rows(mesh, batch))
        return dataclasses.replace(state, buffer=shard)

    return store


def in_turn(chosen: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
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
