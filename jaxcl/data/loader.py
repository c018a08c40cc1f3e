"""Batches of a source, read ahead by Grain.

The law of this file: the rows of global batch t depend only on the seed, the epoch and the rows to draw from, never
on the number of devices or processes. Each process reads its own contiguous slice of every global batch.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, TypedDict, Unpack

import numpy as np

from jaxcl.check import at_least, between, check, refused
from jaxcl.data.source import Source
from jaxcl.errors import UserError
from jaxcl.types import Batch

if TYPE_CHECKING:
    import grain

    from jaxcl.data.workers import WorkerIterator


class Reading(TypedDict, total=False):
    """How batches are read.

    Attributes:
      process_index, process_count: which slice of every global batch this process reads; 0 of 1.
      num_threads: threads that read ahead, two batches each; 0 reads in the caller's thread. 2 where not given.
      num_workers: processes that read ahead, each with so many threads; 0, where not given: threads of this process.
    """

    process_index: int
    process_count: int
    num_threads: int
    num_workers: int


@dataclass(frozen=True, eq=False)
class Loader:
    """The batches of a training phase or an evaluation, by number.

    `loader[t]` is this process's slice of global batch t, `len(loader)` the number of batches, and `iter(loader)` a
    iterator over them all that reads ahead in threads or processes. Its `get_state()` and `set_state(state)` resume exactly,
    whatever had been read ahead; `{"next_index": t}` is the state before batch t.

    A batch holds b = batch_size / process_count rows:
      image: uint8 `[b, H, W, C]`; label: int32 `[b]`; id: int32 `[b]`, the row's index in the source;
      valid: bool `[b]`, False for the padding that fills the last batch of an epoch (image 0, label 0, id -1);
      target: the source's targets by name, `[b, ...]`, where it has any.

    Attributes:
      source: where the rows are.
      order: epoch -> the rows of that epoch, int64, in order.
      rows_per_epoch: padding included.
      window_seed: chooses, with epoch and row, the window of an image that is cut at random; None: images as `read` gives them.
      others: as in `train_batches`.
    """

    source: Source
    order: Callable[[int], np.ndarray]
    rows_per_epoch: int
    _: KW_ONLY
    batch_size: int
    epochs: int
    process_index: int = 0
    process_count: int = 1
    num_threads: int = 2
    num_workers: int = 0
    by_class: bool = False
    window_seed: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check("batch_size", self.batch_size, at_least(1))
        check("epochs", self.epochs, at_least(1))
        check("process_count", self.process_count, at_least(1))
        check("process_index", self.process_index, between(0, self.process_count - 1))
        check("data.threads", self.num_threads, at_least(0))
        check("data.workers", self.num_workers, at_least(0))
        if self.batch_size % self.process_count:
            raise refused("batch_size", self.batch_size, f"a multiple of the {self.process_count} processes")
        if not self.rows_per_epoch:
            raise UserError("indices: there is no row to make batches of, give at least 1")

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows_per_epoch // self.batch_size)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def rows(self, t: int) -> np.ndarray:
        """The rows of this process's slice of batch t, int64 `[b]`, -1 for padding."""
        return _pad(self._rows(t), self.batch_size // self.process_count, -1)

    def _rows(self, t: int) -> np.ndarray:
        """The same without padding: short, or empty, at the end of an epoch."""
        if not 0 <= t < len(self):
            raise IndexError(f"batch {t} of {len(self)}")
        epoch, step = divmod(t, self.steps_per_epoch)
        rows = self.order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        if self.by_class:
            rows = rows[np.argsort(self.source.labels[rows], kind="stable")]
        size = self.batch_size // self.process_count
        return rows[self.process_index * size :][:size]

    def __getitem__(self, t: int) -> Batch:
        rows, size = self._rows(t), self.batch_size // self.process_count
        if self.window_seed is None or self.source.read_random is None:
            images = self.source.read(rows)
        else:
            images = self.source.read_random(rows, (*self.window_seed, t // self.steps_per_epoch))
        batch: Batch = {
            "image": _pad(images, size, 0),
            "label": _pad(self.source.labels[rows], size, 0),
            "id": _pad(rows.astype(np.int32), size, -1),
            "valid": _pad(np.ones(len(rows), bool), size, False),
        }
        if self.source.targets:
            batch["target"] = {name: _pad(x[rows], size, 0) for name, x in self.source.targets.items()}
        return batch

    def begin(self, t: int) -> Iterator[Batch]:
        """The batches from t on; read ahead, unless they only have to be copied."""
        if self.source.in_memory and not self.num_workers:
            return map(self.__getitem__, range(t, len(self)))
        iterator = iter(self)
        iterator.set_state({"next_index": t})
        return iterator

    def __iter__(self) -> "grain.DatasetIterator[Batch] | WorkerIterator":
        import grain

        from jaxcl.data.workers import WorkerIterator

        options = grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=2 * self.num_threads)
        if self.num_workers:
            return WorkerIterator(self, self.num_workers, options)
        return iter(grain.MapDataset.source(self).to_iter_dataset(options))


def train_batches(
    source: Source,
    indices: np.ndarray,
    *,
    batch_size: int,
    epochs: int,
    seed: Sequence[int],
    by_class: bool = False,
    memory: Sequence[int] | np.ndarray = (),
    part: int = 1,
    **reading: Unpack[Reading],
) -> Loader:
    """Batches for training: every epoch visits every row once, in a new order.

    Args:
      source: where the rows are.
      indices: int `[n]`, the rows to train on.
      batch_size: rows of a global batch, over all processes.
      epochs: passes over `indices`; the loader has epochs * ceil(n / batch_size) batches.
      seed: integers >= 0, such as (seed, task): with the epoch they determine the order, and with epoch and row the window
        of an image that is cut at random.
      by_class: sorts the rows of every global batch by class. Each device then sees few classes, and the shards of a sharded
        memory differ as much as they can.
      memory: int `[m]`, rows that join `indices`, in any number of copies.
      part: of every `part` neighbours in `memory` one joins an epoch, drawn anew for each.
      reading: see `Reading`.

    Raises:
      UserError: a size is out of range, or batch_size is no multiple of process_count.
    """
    if not seed or any(s < 0 for s in seed):
        raise refused("seed", tuple(seed), "one or more integers from 0")
    rows = np.array(indices, np.int64), np.array(memory, np.int64)
    order = _Order(*rows, part, tuple(map(int, seed)))
    return Loader(
        source,
        order,
        len(order(0)),
        batch_size=batch_size,
        epochs=epochs,
        by_class=by_class,
        window_seed=tuple(seed),
        **reading,
    )


def eval_batches(
    source: Source, indices: np.ndarray, *, batch_size: int, epochs: int = 1, **reading: Unpack[Reading]
) -> Loader:
    """Batches in the order of `indices`, as for evaluation: every row exactly once. Arguments as in `train_batches`."""
    rows = np.array(indices, np.int64)
    return Loader(source, lambda epoch: rows, len(rows), batch_size=batch_size, epochs=epochs, **reading)


def blank_batches(
    source: Source, *, batch_size: int, steps_per_epoch: int, epochs: int, **reading: Unpack[Reading]
) -> Loader:
    """Batches of padding alone, for steps that train on what the memory replays. Arguments as in `train_batches`."""
    nothing, rows = np.zeros(0, np.int64), steps_per_epoch * batch_size
    reading = {"num_threads": 0, **reading, "num_workers": 0}
    return Loader(source, lambda epoch: nothing, rows, batch_size=batch_size, epochs=epochs, **reading)


class _Order:
    """An epoch's rows in its order, `order(epoch)`; of the memory all, or one of every `part` neighbours."""

    def __init__(self, rows: np.ndarray, memory: np.ndarray, part: int, seed: tuple[int, ...]) -> None:
        self._of = rows, memory, part, seed
        # Two epochs are kept, as threads that read ahead cross the border between them.
        self._kept = functools.lru_cache(maxsize=2)(functools.partial(_shuffled, *self._of))

    def __call__(self, epoch: int) -> np.ndarray:
        return self._kept(epoch)

    def __reduce__(self) -> tuple[type, tuple]:
        return _Order, self._of  # to a worker process, where nothing is kept yet


def _shuffled(rows: np.ndarray, memory: np.ndarray, part: int, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    # The length comes first because a SeedSequence takes (1,) and (1, 0) for the same entropy.
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((len(seed), *seed, epoch))))
    if part > 1:
        begin = np.arange(0, len(memory), part)
        memory = memory[begin + rng.integers(np.minimum(part, len(memory) - begin))]
    return rng.permutation(np.concatenate([rows, memory]))


def _pad(rows: np.ndarray, size: int, value: int) -> np.ndarray:
    """Extends the leading axis to `size`."""
    if len(rows) == size:
        return rows
    padding = np.full((size - len(rows), *rows.shape[1:]), value, rows.dtype)
    return np.concatenate([rows, padding])
