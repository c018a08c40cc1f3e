"""Batches read ahead by worker processes of Grain: for decoding that the threads of one process do not keep up with, because
they take turns in Python.

Worker i of n makes batches i, i + n, ..., and hands them over in shared memory. A worker is a new interpreter: it imports what
the main module imports, and gets a copy of the loader. It leaves signals to its parent, and ends when the parent has ended,
however that came.
"""

import logging
import multiprocessing
import os
import signal
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn

import grain
from absl import flags

from jaxcl.errors import DataError
from jaxcl.types import Batch

if TYPE_CHECKING:
    from jaxcl.data.loader import Loader

BUFFER = 2  # batches that each worker has ready
_LEFT_TO_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class WorkerIterator:
    """The items of `batches`, in order. Its state is that of a Grain iterator without workers, so it resumes with any number.

    The workers start with the first item asked for. They end with the last, with an error, with `close`, and with the iterator.

    Raises:
      DataError: of `next`: a worker has died. What reading an item raises comes through as it is.
    """

    def __init__(self, batches: "Loader", num_workers: int, options: grain.ReadOptions) -> None:
        self._batches, self._num_workers, self._options = batches, num_workers, options
        self._next_index = 0
        self._reader: grain.DatasetIterator[Batch] | None = None
        self._end = lambda: None

    def __iter__(self) -> "WorkerIterator":
        return self

    def __next__(self) -> Batch:
        if self._next_index >= len(self._batches):
            raise StopIteration
        try:
            batch = self._start() if self._reader is None else next(self._reader)
        except BaseException as error:
            self.close()
            if isinstance(error, RuntimeError) and "Worker process was terminated" in str(error):
                raise DataError(f"data.workers: a worker process has died, of too little memory? ({error})") from None
            raise
        self._next_index += 1
        if self._next_index == len(self._batches):
            self.close()
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._next_index = state["next_index"]

    def close(self) -> None:
        """Ends the workers. The iterator starts new ones if it is used again."""
        self._end()
        self._reader = None

    def _start(self) -> Batch:
        """The next item, from new workers."""
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # else Grain, which has flags, refuses to start workers outside a command
        dataset = grain.MapDataset.source(self._batches).slice(slice(self._next_index, None))
        workers = grain.MultiprocessingOptions(min(self._num_workers, len(dataset)), BUFFER)
        reader = iter(dataset.to_iter_dataset(self._options).mp_prefetch(workers, worker_init_fn=_begin))
        self._reader, self._end = reader, weakref.finalize(self, reader.close)
        # What starts a process hands down which signals it blocks: this thread and those that Grain starts in it block them.
        with ThreadPoolExecutor(
            1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, _LEFT_TO_THE_PARENT)
        ) as own:
            return own.submit(next, reader).result()


def _begin(index: int, count: int) -> None:
    """In a worker, before it reads."""
    logging.getLogger("jaxcl").disabled = True  # what is to be said, the parent has said
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> NoReturn:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
