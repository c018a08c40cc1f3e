"""A source: labelled images of one split, by row. The loader asks for the rows of one batch, on any thread."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxcl.check import Rule, check
from jaxcl.errors import UserError

MOST_CLASSES = 2**20  # a head of 1,024 features then has 4 GiB of weights
_SHARE = Rule(lambda x: 0 < x < 1, "a share above 0 and below 1")


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled images of one split, by row.

    Attributes:
      labels: int32 `[n]`, each in 0..K-1.
      image_shape: (H, W, C).
      class_names: K names, by label.
      read: `read(indices: int [m]) -> uint8 [m, H, W, C]`, a fresh array, in the order asked for. Thread-safe.
      read_random: `read_random(indices, seed)`, the same of a window of each image that seed and index choose; for training
        on images of many sizes. None where an image is read whole.
      targets: what a model is to reconstruct from each image, float32 `[n, ...]` by name; {} where it classifies.
      in_memory: whether `read` copies rows that are decoded already, so that no thread has to read ahead.
    """

    labels: np.ndarray
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    read: Callable[[np.ndarray], np.ndarray]
    read_random: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] | None = None
    targets: Mapping[str, np.ndarray] = field(default_factory=dict)
    in_memory: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: np.ndarray) -> "Source":
        """A source whose row i is row `rows[i]` of this one."""
        random = self.read_random
        return Source(
            self.labels[rows],
            self.image_shape,
            self.class_names,
            lambda indices: self.read(rows[indices]),
            None if random is None else lambda indices, seed: random(rows[indices], seed),
            {name: values[rows] for name, values in self.targets.items()},
            self.in_memory,
        )


def array_source(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Source:
    """A source over arrays in memory: images uint8 `[n, H, W, C]`, labels int `[n]` in 0..K-1."""
    # Indexing with an array copies, so no caller can write into the set. What is mapped gives plain arrays.
    read, in_memory = np.asarray(images).__getitem__, not isinstance(images, np.memmap)
    return Source(labels.astype(np.int32), images.shape[1:], tuple(class_names), read, in_memory=in_memory)


def rows_of_each(numbers: np.ndarray, count: int) -> list[np.ndarray]:
    """The rows, int64 and ascending, at which `numbers` int `[n]` is 0, 1, ..., count - 1; other numbers belong to none."""
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.searchsorted(numbers[order], np.arange(count + 1)))[1:-1]


def hold_out(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """Splits a source into (what is left, validation rows), class by class; both number their rows anew, in the old order.

    Done before `make_scenario`, which then gives every task validation rows as it gives it test rows.

    Args:
      source: the train rows.
      share: of each class's rows, rounded, but at least one and not all where a class has two; in (0, 1).
      seed: which rows; neither devices nor the seed of a run change them.

    Raises:
      UserError: a share out of range, or no class has two rows.
    """
    check("data.validation", share, _SHARE)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(1,))))
    held = np.zeros(len(source), bool)
    for rows in rows_of_each(source.labels, source.num_classes):
        held[rng.permutation(rows)[: min(max(round(share * len(rows)), 1), len(rows) - 1)]] = True
    if not held.any():
        raise UserError(f"data.validation: {share} is not allowed, give 0: no class has two train rows")
    return source.part(np.flatnonzero(~held)), source.part(np.flatnonzero(held))
