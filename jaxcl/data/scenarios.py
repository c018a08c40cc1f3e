"""Class-incremental scenarios: a labelled set split by class into tasks that arrive one after another.

The setting of Bouvier et al. (CCGrid 2024, section VI), where ImageNet's 1,000 classes arrive as 4 tasks of 250.
A task is row numbers into a source, no copy of its images, and labels keep their original values, so one
classifier of K outputs serves from the first task to the last.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxcl.errors import UserError


@dataclass(frozen=True, eq=False)
class Task:
    """One task.

    Attributes:
      index: its place in the scenario, from 0.
      classes: the labels that appear in it.
      train: int64 [n], its rows of the train source, ascending.
      test: int64 [m], its rows of the test source, ascending.
    """

    index: int
    classes: tuple[int, ...]
    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True, eq=False)
class Scenario:
    """Tasks with disjoint classes, in order of arrival, out of `num_classes` classes."""

    tasks: tuple[Task, ...]
    num_classes: int

    @functools.cached_property
    def task_of_class(self) -> np.ndarray:
        """int32 [num_classes]: the task in which a class appears, -1 for a class that is in none."""
        task_of = np.full(self.num_classes, -1, np.int32)
        for task in self.tasks:
            task_of[list(task.classes)] = task.index
        return task_of

    @functools.cached_property
    def class_table(self) -> np.ndarray:
        """bool [T, K]: the classes that appear in each task."""
        table = np.zeros((len(self.tasks), self.num_classes), bool)
        for task in self.tasks:
            table[task.index, list(task.classes)] = True
        return table

    def seen(self, t: int) -> np.ndarray:
        """int64 [n]: the train rows of tasks 0..t, what training from scratch after task t uses."""
        if not 0 <= t < len(self.tasks):
            raise IndexError(f"task {t} of {len(self.tasks)}")
        return np.concatenate([task.train for task in self.tasks[: t + 1]])


def class_incremental(
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    tasks: int | Sequence[Sequence[int]],
    class_order_seed: int | None = None,
) -> Scenario:
    """Splits a set by class.

    Args:
      train_labels, test_labels: int [n], in 0..num_classes-1.
      num_classes: K.
      tasks: a number of tasks, of equal size (where K does not divide, the first ones have one class more), or the
        classes of every task, in any sizes and not necessarily all of them.
      class_order_seed: shuffles the classes before a number of tasks divides them; None keeps 0, 1, 2...

    Raises:
      UserError: the split is impossible, or a task would have no train or no test rows.
    """
    split = _classes(tasks, num_classes, class_order_seed)
    made = []
    for index, classes in enumerate(split):
        rows = [np.flatnonzero(np.isin(labels, classes)) for labels in (train_labels, test_labels)]
        for name, found in zip(("train", "test"), rows, strict=True):
            if not len(found):
                raise UserError(
                    f"tasks: task {index} (classes {list(classes)}) has no {name} rows; at least 1 is needed"
                )
        made.append(Task(index, classes, *rows))
    return Scenario(tuple(made), num_classes)


def _classes(
    tasks: int | Sequence[Sequence[int]], num_classes: int, class_order_seed: int | None
) -> list[tuple[int, ...]]:
    if isinstance(tasks, int | np.integer):
        if not 1 <= tasks <= num_classes:
            raise UserError(f"tasks {tasks}: allowed are 1..{num_classes}, the number of classes")
        order = np.arange(num_classes)
        if class_order_seed is not None:
            if class_order_seed < 0:
                raise UserError(f"class_order_seed {class_order_seed}: allowed are None and integers from 0")
            order = np.random.Generator(np.random.Philox(class_order_seed)).permutation(num_classes)
        return [tuple(part.tolist()) for part in np.array_split(order, int(tasks))]

    if class_order_seed is not None:
        raise UserError(f"class_order_seed {class_order_seed}: allowed is None where tasks lists the classes")
    if not _is_list(tasks) or not all(_is_list(part) for part in tasks):
        raise UserError(f"tasks {tasks!r}: allowed are an integer and a non-empty list of non-empty lists of classes")
    owner: dict[int, int] = {}
    for t, part in enumerate(tasks):
        for k in part:
            if not isinstance(k, int | np.integer) or not 0 <= k < num_classes:
                raise UserError(f"tasks: task {t} names class {k!r}; allowed are 0..{num_classes - 1}")
            if k in owner:
                raise UserError(
                    f"tasks: class {k} is in task {owner[k]} and again in task {t}; each class may appear once"
                )
            owner[int(k)] = t
    return [tuple(int(k) for k in part) for part in tasks]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
