"""The batches of a run on their way to the devices: read, put together and handed over in a thread, ahead of the steps."""

from collections.abc import Sequence
from typing import Any, Protocol

from jaxcl.errors import DataError
from jaxcl.runs.lanes import Lanes
from jaxcl.types import PyTree


class Feed(Protocol):
    """Batches of one stretch of steps.

    Attributes:
      most: steps of a call at most; of 1 the batches are those of `Lanes.batch`, else they have a leading axis of `most`.
    """

    most: int

    def __call__(self, index: int, count: int) -> tuple[PyTree, int]:
        """Batches `index` to `index + count - 1` on the devices, in this order one call after the other, or as many as can be
        read before one that cannot; how many.

        Raises:
          DataError: a row of batch `index` cannot be read.
        """


class Streamed:
    """Batches as they are read, one loader a lane."""

    def __init__(self, lanes: Lanes, loaders: Sequence[Any], most: int = 1):
        self.most, self._lanes, self._loaders = most, lanes, loaders
        self._iterators: list[Any] = []
        self._failure: DataError | None = None

    def __call__(self, index: int, count: int) -> tuple[PyTree, int]:
        if not self._iterators:
            self._iterators = [loader.begin(index) for loader in self._loaders]
        steps: list[list[Any]] = []
        while len(steps) < count and self._failure is None:
            try:
                steps.append([next(iterator) for iterator in self._iterators])
            except DataError as failure:
                self._failure = failure
        if not steps:
            assert self._failure is not None
            raise self._failure
        if self.most == 1:
            return self._lanes.batch(steps[0]), 1
        return self._lanes.batches(steps, self.most), len(steps)
