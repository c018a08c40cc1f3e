"""The interface of a strategy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

PyTree = Any


class Strategy(NamedTuple):
    """A way of continual learning.

    Attributes:
      cumulative: each task trains on the data of all tasks so far, not on its own alone.
      fresh: each task starts from newly initialised weights and optimiser.
      record: `(batch) -> pytree`: what the buffer stores of a batch `{"image": uint8 [b, H, W, C], ...}`, leaves
        `[b, ...]`; None for strategies without rehearsal. A record has at least the leaf "image".
    """

    cumulative: bool = False
    fresh: bool = False
    record: Callable[[dict[str, jax.Array]], PyTree] | None = None
