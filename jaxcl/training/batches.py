"""The batches of a run: a task's own rows, with those of the memory among them or not; the memory alone; the test rows.

Replay takes one of three forms, `config.buffer.replay`:

  draw          every step replays rows drawn from the memory as it then is, `buffer.representatives` of them.
  append        the memory, as the task begins, joins the task's data set: each of its rows comes once an epoch.
  append_part   as DyTox's ranks do it: each appends a memory of its own before the rows are divided between them. Of a
                memory made by n choices an n-th comes an epoch, another one each time.

They replay different numbers of rows, see `draws_per_epoch`. A fine-tuning (`config.finetune`) passes over the memory alone at
a task's end, from the second task on: classes are balanced there (Douillard et al., CVPR 2022; BiC and others before it). Its
order is "shuffled", or the "sequential" one of DyTox's published runs: rows class by class, and all ranks at the same place.
With a memory of their own each they see different rows of the same classes; with one memory the same rows, so that a step
sees no more of them than one rank does.

All is decided by the ids that the memory holds, so a batch's rows are the same on any number of devices and processes.
"""

import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jaxcl import data
from jaxcl.buffer import Buffer, Shard
from jaxcl.data import Loader, Source
from jaxcl.runs.steps import reading
from jaxcl.training.build import Parts
from jaxcl.training.large_batch import epochs_of
from jaxcl.training.state import TrainState


def train_batches(config: ConfigDict, parts: Parts, task: int, state: TrainState | None = None) -> Loader | None:
    """Batches of the rows a task trains on; None where there are none.

    With the `state` in which the task begins, the rows of the memory are among them if they are appended.
    """
    rows, memory, part = parts.strategy.rows(parts.scenario, task), np.zeros(0, np.int64), 1
    if not len(rows):
        return None
    if state is not None and state.buffer is not None and config.buffer.replay != "draw":
        memory = memory_rows(config, parts.train, state.buffer, parts.shards)
        part = choices(config, parts.shards) if config.buffer.replay == "append_part" else 1
    return data.train_batches(
        parts.train,
        rows,
        batch_size=config.batch_size,
        epochs=epochs_of(config),
        seed=(config.seed, task),
        by_class=config.data.placement == "by_class",
        memory=memory,
        part=part,
        **reading(config.data.threads, config.data.workers),
    )


def review_batches(config: ConfigDict, parts: Parts, task: int, state: TrainState) -> Loader | None:
    """Batches of the second phase of a task, on the memory alone; None where it has none."""
    if parts.review is None:
        return None
    assert parts.buffer is not None and state.buffer is not None
    if parts.strategy.rehearse:  # one row a device that is not valid: a step trains on what it draws from the memory
        steps = -(-parts.buffer.stats(state.buffer)["rows"] // parts.buffer.representatives)
        sizes = {"batch_size": parts.shards, "steps_per_epoch": steps, "epochs": parts.strategy.rehearse}
        return data.blank_batches(parts.train, **sizes, **reading(threads=0))
    memory = memory_rows(config, parts.train, state.buffer, parts.shards)
    return finetune_batches(config, parts.train, memory, task, parts.shards)


def finetune_batches(config: ConfigDict, source: Source, memory: np.ndarray, task: int, devices: int) -> Loader | None:
    """Batches of the memory alone; None in the first task, whose rows it has just seen."""
    if not task or not len(memory):
        return None
    sizes = {
        "batch_size": config.batch_size,
        "epochs": config.finetune.epochs,
        **reading(config.data.threads, config.data.workers),
    }
    if config.finetune.order == "shuffled":
        return data.train_batches(source, memory, seed=(config.seed, task, 1), **sizes)
    ranks = 1 if choices(config, devices) > 1 else config.finetune.ranks or devices
    return data.eval_batches(source, at_one_place(memory, config.batch_size // ranks, ranks), **sizes)


def task_batches(config: ConfigDict, parts: Parts, task: int) -> Loader:
    """The rows of a task once, for the pass at its end."""
    rows = parts.strategy.rows(parts.scenario, task)
    return data.eval_batches(
        parts.train, rows, batch_size=config.eval.batch_size, **reading(config.data.threads, config.data.workers)
    )


def evaluation_batches(config: ConfigDict, parts: Parts) -> Loader:
    """The test rows of all tasks once."""
    rows = np.concatenate([task.test for task in parts.scenario.tasks])
    return data.eval_batches(
        parts.test, rows, batch_size=config.eval.batch_size, **reading(config.data.threads, config.data.workers)
    )


def memory_rows(config: ConfigDict, source: Source, shard: Shard, devices: int) -> np.ndarray:
    """The rows of the train source that the memory holds, int64 `[n]`, class by class; copies included, but of a replicated
    memory one. In a run of several processes all must call it."""
    ids = np.asarray(multihost_utils.process_allgather(shard.id, tiled=True)).astype(np.int64)
    if config.buffer.memory == "replicated":
        ids = ids[: len(ids) // devices]
    ids = np.sort(ids[ids >= 0])
    return ids[np.argsort(source.labels[ids], kind="stable")]


def choices(config: ConfigDict, devices: int) -> int:
    """How many choices of rows the memory is made of."""
    return devices if config.buffer.memory == "independent" else config.buffer.selection.ways


def at_one_place(rows: np.ndarray, each: int, ranks: int) -> np.ndarray:
    """The order in which all ranks walk through the same rows, `each` a step: of every batch the same rows `ranks` times."""
    return np.concatenate([np.tile(rows[begin : begin + each], ranks) for begin in range(0, len(rows), each)])


def draws_per_epoch(config: ConfigDict, buffer: Buffer, rows_per_shard: list[int], steps_per_epoch: int) -> int:
    """Rows replayed in an epoch of a task: of "draw" those of an epoch that begins with a memory of so many rows."""
    whole, devices = sum(rows_per_shard), len(rows_per_shard)
    one = rows_per_shard[0] if config.buffer.memory == "replicated" else whole
    if config.buffer.replay == "append":
        return one
    if config.buffer.replay == "append_part":
        return -(-one // choices(config, devices))
    if config.buffer.memory == "independent" or config.buffer.exchange == "local":
        return steps_per_epoch * sum(min(buffer.representatives // devices, rows) for rows in rows_per_shard)
    return steps_per_epoch * min(buffer.representatives, one)
