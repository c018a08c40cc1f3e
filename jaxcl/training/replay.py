"""The memory as a data set: its rows join those of a task, or are trained on alone.

Replay takes one of three forms, `config.buffer.replay`:

  draw          every step replays rows drawn from the memory as it then is, `buffer.representatives` of them.
  append        the memory, as the task begins, joins the task's data set: each of its rows comes once an epoch.
  append_part   as DyTox's ranks do it, of which each appends a memory of its own before they divide the rows between them:
                of a memory made by n choices an n-th comes an epoch, another one each time.

They replay different numbers of rows, see `draws_per_epoch`. A fine-tuning (`config.finetune`) passes over the memory alone at
a task's end, from the second task on: classes are balanced there (Douillard et al., CVPR 2022; BiC and others before it). Its
order is "shuffled", or the "sequential" one of DyTox's published runs: rows class by class, and all ranks at the same place.
With a memory of their own each they see different rows of the same classes; with one memory the same rows, so that a step
sees no more of them than one rank does.

All is decided by the ids that the memory holds, so a batch's rows are the same on any number of devices and processes.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jaxcl import data
from jaxcl.buffer import Buffer, Shard
from jaxcl.data import Source

REPLAYS = ("draw", "append", "append_part")
ORDERS = ("shuffled", "sequential")


def memory_rows(config: ConfigDict, source: Source, shard: Shard, devices: int) -> np.ndarray:
    """The rows of the train source that the memory holds, int64, class by class; copies included, but of a replicated memory
    one. In a run of several processes all must call it."""
    ids = np.asarray(multihost_utils.process_allgather(shard.id, tiled=True)).astype(np.int64)
    if config.buffer.memory == "replicated":
        ids = ids[: len(ids) // devices]
    ids = np.sort(ids[ids >= 0])
    return ids[np.argsort(source.labels[ids], kind="stable")]


def choices(config: ConfigDict, devices: int) -> int:
    """How many choices of rows the memory is made of."""
    return devices if config.buffer.memory == "independent" else config.buffer.selection.ways


def finetune_batches(
    config: ConfigDict, source: Source, memory: np.ndarray, task: int, devices: int
) -> data.Loader | None:
    """Batches of the memory alone; None in the first task, whose rows it has just seen."""
    if not task or not len(memory):
        return None
    options = {
        "batch_size": config.batch_size,
        "epochs": config.finetune.epochs,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "num_threads": config.data.threads,
    }
    if config.finetune.order == "shuffled":
        return data.train_batches(source, memory, seed=(config.seed, task, 1), **options)
    ranks = 1 if choices(config, devices) > 1 else config.finetune.ranks or devices
    return data.eval_batches(source, at_one_place(memory, config.batch_size // ranks, ranks), **options)


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
