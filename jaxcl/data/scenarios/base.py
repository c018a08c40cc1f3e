"""What scenarios share: tasks, what a scenario is given, the split by class, rows dealt out anew, images changed by task."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxcl.check import at_least, check, refused
from jaxcl.data.source import Source, rows_of_each
from jaxcl.errors import UserError

Tasks = int | Sequence[Sequence[int]]
Change = Callable[[int, np.ndarray], np.ndarray]  # (task, images uint8 [m, H, W, C]) -> the same shape


@dataclass(frozen=True, eq=False)
class Task:
    """One task.

    Attributes:
      index: its place in the scenario, from 0.
      classes: the labels that appear in its train rows.
      train: int64 `[n]`, its rows of the train source, ascending.
      test: int64 `[m]`, its rows of the test source, ascending.
    """

    index: int
    classes: tuple[int, ...]
    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True, eq=False)
class Scenario:
    """Tasks in order of arrival, out of `num_classes` classes; each test row is in one task at most."""

    tasks: tuple[Task, ...]
    num_classes: int

    @functools.cached_property
    def task_of_test_row(self) -> np.ndarray:
        """int32 `[n]`: the task in whose test a row of the test source is, -1 for none, up to the last row that is in one."""
        task_of = np.full(1 + max(int(task.test.max()) for task in self.tasks), -1, np.int32)
        for task in self.tasks:
            task_of[task.test] = task.index
        return task_of

    @functools.cached_property
    def task_of_train_row(self) -> np.ndarray:
        """int32 `[n]`: the first task in which a row of the train source comes, up to the last row that is in one."""
        task_of = np.zeros(1 + max(int(task.train.max(initial=0)) for task in self.tasks), np.int32)
        for task in reversed(self.tasks):
            task_of[task.train] = task.index
        return task_of

    @functools.cached_property
    def class_table(self) -> np.ndarray:
        """bool `[T, K]`: the classes that appear in each task."""
        table = np.zeros((len(self.tasks), self.num_classes), bool)
        for task in self.tasks:
            table[task.index, list(task.classes)] = True
        return table

    def seen(self, t: int) -> np.ndarray:
        """int64 `[n]`: the train rows of tasks 0..t, what training from scratch after task t uses."""
        if not 0 <= t < len(self.tasks):
            raise IndexError(f"task {t} of {len(self.tasks)}")
        return np.concatenate([task.train for task in self.tasks[: t + 1]])


@dataclass(frozen=True)
class Split:
    """What a scenario is given: the arguments of `make_scenario`."""

    train: Source
    test: Source
    kind: str
    tasks: Tasks
    class_order_seed: int | None
    seed: int
    scattered: float
    disjoint: float

    def rng(self) -> np.random.Generator:
        """A generator that begins at `seed`."""
        return np.random.Generator(np.random.Philox(self.seed))

    def by_class(self) -> Scenario:
        """The classes divided among the tasks, as `class_incremental` does it."""
        train, test = self.train, self.test
        return class_incremental(train.labels, test.labels, train.num_classes, self.tasks, self.class_order_seed)

    def number_of_tasks(self, most: int, of: str) -> int:
        """`tasks`, where it cannot list classes: 1..most, which is the number `of` something.

        Raises:
          UserError: it is no such number, or there is a `class_order_seed`.
        """
        if not isinstance(self.tasks, int | np.integer):
            raise refused("data.tasks", self.tasks, f"a number of tasks with data.scenario = {self.kind}")
        if not 1 <= self.tasks <= most:
            raise refused("data.tasks", self.tasks, f"1..{most}, {of}")
        if self.class_order_seed is not None:
            raise refused("data.class_order_seed", self.class_order_seed, f"None with data.scenario = {self.kind}")
        return int(self.tasks)

    def repeats(self) -> int:
        """`tasks`, where every task has all rows, their images changed.

        Raises:
          UserError: as `number_of_tasks`; there are more rows than an id can number; images are to be reconstructed.
        """
        if self.train.targets:
            raise refused("data.scenario", self.kind, "one that leaves images as they are, to be reconstructed")
        most = (2**31 - 1) // max(len(self.train), len(self.test))
        return self.number_of_tasks(most, "so that an int32 numbers all rows")


Made = tuple[Scenario, Source, Source]  # tasks, and the train and test sources that their rows number


def appear(labels: np.ndarray) -> tuple[int, ...]:
    """The labels that there are, ascending."""
    return tuple(np.unique(labels).tolist())


# ---- by class ----


def class_incremental(
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    tasks: Tasks,
    class_order_seed: int | None = None,
) -> Scenario:
    """Splits a set by class.

    Args:
      train_labels, test_labels: int `[n]`, in 0..num_classes-1.
      num_classes: K.
      tasks: a number of tasks, of equal size (where K does not divide, the first ones have one class more), or the
        classes of every task, in any sizes and not necessarily all of them.
      class_order_seed: shuffles the classes before a number of tasks divides them; None keeps 0, 1, 2...

    Raises:
      UserError: the split is impossible, or a task would have no train or no test rows.
    """
    split = _divide(tasks, num_classes, class_order_seed)
    task_of = np.full(num_classes, -1)
    for index, classes in enumerate(split):
        task_of[list(classes)] = index
    train, test = (rows_of_each(task_of[labels], len(split)) for labels in (train_labels, test_labels))
    made = tuple(Task(*parts) for parts in zip(range(len(split)), split, train, test, strict=True))
    for task in made:
        for name, rows in (("train", task.train), ("test", task.test)):
            if not len(rows):
                raise UserError(
                    f"data.tasks: task {task.index} (classes {list(task.classes)}) has no {name} rows, give classes that have"
                )
    return Scenario(made, num_classes)


def _divide(tasks: Tasks, num_classes: int, class_order_seed: int | None) -> list[tuple[int, ...]]:
    """The classes of every task."""
    if isinstance(tasks, int | np.integer):
        if not 1 <= tasks <= num_classes:
            raise refused("data.tasks", tasks, f"1..{num_classes}, the number of classes")
        order = np.arange(num_classes)
        if class_order_seed is not None:
            check("data.class_order_seed", class_order_seed, at_least(0))
            order = np.random.Generator(np.random.Philox(class_order_seed)).permutation(num_classes)
        return [tuple(part.tolist()) for part in np.array_split(order, int(tasks))]

    if class_order_seed is not None:
        raise refused("data.class_order_seed", class_order_seed, "None where data.tasks lists the classes")
    if not _is_list(tasks) or not all(_is_list(part) for part in tasks):
        raise refused("data.tasks", tasks, "a number, or a list with a list of classes for each task")
    owner: dict[int, int] = {}
    for t, part in enumerate(tasks):
        for k in part:
            if not isinstance(k, int | np.integer) or not 0 <= k < num_classes:
                raise UserError(f"data.tasks: class {k!r} in task {t} is not allowed, give 0..{num_classes - 1}")
            if k in owner:
                raise UserError(f"data.tasks: class {k} is in task {owner[k]} and again in task {t}, give it once")
            owner[int(k)] = t
    return [tuple(int(k) for k in part) for part in tasks]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


# ---- rows dealt out anew ----


def scatter(
    scenario: Scenario, labels: np.ndarray, share: float, blurry: np.ndarray, rng: np.random.Generator
) -> Scenario:
    """Takes a share of each task's rows of the classes `blurry` [K] and deals them out anew, as many to each task as before."""
    taken = []
    for task in scenario.tasks:
        rows = task.train[blurry[labels[task.train]]]
        taken.append(rng.permutation(rows)[: round(share * len(rows))])
    mixed = np.split(rng.permutation(np.concatenate(taken)), np.cumsum([len(rows) for rows in taken])[:-1])
    tasks = []
    for task, out, into in zip(scenario.tasks, taken, mixed, strict=True):
        rows = np.sort(np.concatenate([np.setdiff1d(task.train, out), into]))
        tasks.append(Task(task.index, appear(labels[rows]), rows, task.test))
    return Scenario(tuple(tasks), scenario.num_classes)


# ---- all rows in every task, changed ----


def repeat(split: Split, change: Change) -> Made:
    """Every task has all rows, as `change` makes them: row t * n + i is row i in task t."""
    tasks, classes = split.repeats(), appear(split.train.labels)
    train, test = (_repeated(source, tasks, change) for source in (split.train, split.test))
    rows, test_rows = (np.arange(len(source)).reshape(tasks, -1) for source in (train, test))
    made = tuple(Task(t, classes, rows[t], test_rows[t]) for t in range(tasks))
    return Scenario(made, train.num_classes), train, test


def _repeated(source: Source, tasks: int, change: Change) -> Source:
    n = len(source)

    def read(indices: np.ndarray) -> np.ndarray:
        images = source.read(indices % n)
        for task in np.unique(indices // n):
            here = indices // n == task
            images[here] = change(int(task), images[here])
        return images

    labels = np.tile(source.labels, tasks)
    return Source(labels, source.image_shape, source.class_names, read, in_memory=source.in_memory)
