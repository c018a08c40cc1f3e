"""Scenarios: a labelled set split into tasks that arrive one after another.

    class      new classes: a task holds all rows of its own. Bouvier et al. (CCGrid 2024, section VI): ImageNet's 1,000
               classes as 4 tasks of 250
    domain     as class, but labels count from 0 in every task: the same answers, for new kinds of images
    instance   new rows of the same classes: each task has an equal part of every class
    permuted   all rows, their pixels in an order of the task's own; Goodfellow et al. 2013, Kirkpatrick et al. 2017
    rotated    all rows, turned by an angle of the task's own; Lopez-Paz & Ranzato 2017
    blurry     as class, but a share of each class's train rows is scattered over the other tasks; Bang et al. 2021
    si_blurry  classes fall to tasks at random; some stay disjoint, of the others a share of rows is scattered; Moon et al. 2023

A task is row numbers into a source, no copy of its images. Which rows, which classes, which permutation and angle are
determined by the data and a seed. One pass over any of them (`epochs` = 1) is an online stream; one head a task
(task-incremental) is `data.loss_classes` = "task".
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.ndimage

from jaxcl.data.sources import Source
from jaxcl.errors import UserError

SCENARIOS = ("class", "domain", "instance", "permuted", "rotated", "blurry", "si_blurry")


@dataclass(frozen=True, eq=False)
class Task:
    """One task.

    Attributes:
      index: its place in the scenario, from 0.
      classes: the labels that appear in its train rows.
      train: int64 [n], its rows of the train source, ascending.
      test: int64 [m], its rows of the test source, ascending.
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
        """int32 [n]: the task in whose test a row of the test source is, -1 for none, up to the last row that is in one."""
        task_of = np.full(1 + max(int(task.test.max()) for task in self.tasks), -1, np.int32)
        for task in self.tasks:
            task_of[task.test] = task.index
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


def make_scenario(
    train: Source,
    test: Source,
    kind: str = "class",
    tasks: int | Sequence[Sequence[int]] = 5,
    *,
    class_order_seed: int | None = None,
    seed: int = 0,
    scattered: float = 0.1,
    disjoint: float = 0.5,
) -> tuple[Scenario, Source, Source]:
    """Splits a data set into tasks; the sources returned are those that the tasks' rows number.

    Args:
      train, test: the data.
      kind: one of `SCENARIOS`, see above.
      tasks: how many; for "class", "domain" and "blurry" also the classes of each, see `class_incremental`.
      class_order_seed: of "class", "domain" and "blurry", see `class_incremental`.
      seed: of permutations, angles and scattered rows.
      scattered: the share of rows that "blurry" and "si_blurry" scatter, of the classes that are not disjoint; 0..1.
      disjoint: the share of classes that stay within their task in "si_blurry"; 0..1.

    Raises:
      UserError: an unknown kind, a share out of range, or an impossible split.
    """
    if kind not in SCENARIOS:
        raise UserError(f"scenario {kind!r}: allowed are {', '.join(SCENARIOS)}")
    for name, share in (("scattered", scattered), ("disjoint", disjoint)):
        if not 0 <= share <= 1:
            raise UserError(f"scenario_{name} {share}: allowed are numbers from 0 to 1")
    rng = np.random.Generator(np.random.Philox(seed))
    if kind in ("class", "domain", "blurry"):
        made = class_incremental(train.labels, test.labels, train.num_classes, tasks, class_order_seed)
        if kind == "blurry":
            made = _scatter(made, train.labels, scattered, np.ones(train.num_classes, bool), rng)
        return _renumbered(made, train, test) if kind == "domain" else (made, train, test)
    if not isinstance(tasks, int | np.integer) or tasks < 1:
        raise UserError(f"tasks {tasks!r}: allowed is a number of tasks with scenario {kind!r}")
    if class_order_seed is not None:
        raise UserError(f"class_order_seed {class_order_seed}: allowed is None with scenario {kind!r}")
    if kind == "instance":
        return _by_instance(train, test, int(tasks), rng), train, test
    if kind == "si_blurry":
        return _si_blurry(train, test, int(tasks), scattered, disjoint, rng), train, test
    if train.targets:
        raise UserError(f"scenario {kind!r}: not allowed with images to be reconstructed; they would no longer match")
    change = _permutations if kind == "permuted" else _rotations
    read = change(train.image_shape, int(tasks), rng)
    train, test = (_repeated(source, int(tasks), read) for source in (train, test))
    rows, test_rows = (np.arange(len(source)).reshape(tasks, -1) for source in (train, test))
    classes = _appear(train.labels)
    parts = tuple(Task(t, classes, rows[t], test_rows[t]) for t in range(int(tasks)))
    return Scenario(parts, train.num_classes), train, test


def hold_out(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """Splits a source into (what is left, validation rows), class by class; both number their rows anew, in the old order.

    Done before `make_scenario`, which then gives every task validation rows as it gives it test rows.

    Args:
      source: the train rows.
      share: of each class's rows, rounded, but at least one and not all where a class has two; in (0, 1).
      seed: which rows; neither devices nor the seed of a run change them.

    Raises:
      UserError: no class has two rows.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(1,))))
    held = np.zeros(len(source), bool)
    for k in range(source.num_classes):
        rows = np.flatnonzero(source.labels == k)
        held[rng.permutation(rows)[: min(max(round(share * len(rows)), 1), len(rows) - 1)]] = True
    if not held.any():
        raise UserError(f"data.validation {share}: not possible, no class has two train rows")

    def part(rows: np.ndarray) -> Source:
        return Source(source.labels[rows], source.image_shape, source.class_names, lambda i: source.read(rows[i]))

    return part(np.flatnonzero(~held)), part(np.flatnonzero(held))


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


def _appear(labels: np.ndarray) -> tuple[int, ...]:
    return tuple(np.unique(labels).tolist())


def _renumbered(scenario: Scenario, train: Source, test: Source) -> tuple[Scenario, Source, Source]:
    """Labels counted from 0 within each task, in the order in which it lists its classes."""
    most = max(len(task.classes) for task in scenario.tasks)
    number = np.zeros(scenario.num_classes, np.int32)
    for task in scenario.tasks:
        number[list(task.classes)] = np.arange(len(task.classes))
    names = tuple(str(k) for k in range(most))
    train, test = (dataclasses.replace(x, labels=number[x.labels], class_names=names) for x in (train, test))
    tasks = tuple(Task(t.index, tuple(range(len(t.classes))), t.train, t.test) for t in scenario.tasks)
    return Scenario(tasks, most), train, test


def _by_instance(train: Source, test: Source, tasks: int, rng: np.random.Generator) -> Scenario:
    """Every class dealt to the tasks in equal parts, to within one row; test rows too."""

    def deal(labels: np.ndarray) -> list[np.ndarray]:
        mixed = rng.permutation(len(labels))
        by_class = mixed[np.argsort(labels[mixed], kind="stable")]
        return [np.sort(by_class[t::tasks]) for t in range(tasks)]

    parts = list(zip(deal(train.labels), deal(test.labels), strict=True))
    if not all(len(a) and len(b) for a, b in parts):
        raise UserError(f"tasks {tasks}: allowed are 1..{min(len(train), len(test))}, the number of rows")
    return Scenario(tuple(Task(t, _appear(train.labels[a]), a, b) for t, (a, b) in enumerate(parts)), train.num_classes)


def _scatter(
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
        tasks.append(Task(task.index, _appear(labels[rows]), rows, task.test))
    return Scenario(tuple(tasks), scenario.num_classes)


def _si_blurry(
    train: Source, test: Source, tasks: int, share: float, disjoint: float, rng: np.random.Generator
) -> Scenario:
    """Moon et al. 2023, section 3: borders between tasks are drawn among the shuffled classes, for those that stay disjoint
    and for the others apart. Before that every task gets one class, so that none is left without."""
    k = train.num_classes
    if tasks > k:
        raise UserError(f"tasks {tasks}: allowed are 1..{k}, the number of classes")
    order, number = rng.permutation(k), round(disjoint * k)
    first = rng.permutation(k)[:tasks]
    owner = np.zeros(k, int)
    for part in (order[:number], order[number:]):
        rest = part[~np.isin(part, first)]
        borders = np.sort(rng.integers(0, len(rest) + 1, tasks - 1))
        owner[rest] = np.searchsorted(borders, np.arange(len(rest)), side="right")
    owner[first] = np.arange(tasks)
    split = [np.flatnonzero(owner == t).tolist() for t in range(tasks)]
    blurry = np.ones(k, bool)
    blurry[order[:number]] = False
    return _scatter(class_incremental(train.labels, test.labels, k, split), train.labels, share, blurry, rng)


Change = Callable[[int, np.ndarray], np.ndarray]


def _permutations(shape: tuple[int, int, int], tasks: int, rng: np.random.Generator) -> Change:
    """Pixels in an order of each task's own, channels together."""
    order = [rng.permutation(shape[0] * shape[1]) for _ in range(tasks)]

    def change(task: int, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1, shape[2])[:, order[task]].reshape(images.shape)

    return change


def _rotations(shape: tuple[int, int, int], tasks: int, rng: np.random.Generator) -> Change:
    """An angle of each task's own, uniform in 0..180 degrees, about the centre; linear interpolation, black outside."""
    angle = rng.uniform(0, 180, tasks)

    def change(task: int, images: np.ndarray) -> np.ndarray:
        return scipy.ndimage.rotate(images, angle[task], axes=(1, 2), reshape=False, order=1)

    return change


def _repeated(source: Source, tasks: int, change: Change) -> Source:
    """The source `tasks` times over: row t * n + i is row i as task t changes it."""
    n = len(source)

    def read(indices: np.ndarray) -> np.ndarray:
        images = source.read(indices % n)
        for task in np.unique(indices // n):
            here = indices // n == task
            images[here] = change(int(task), images[here])
        return images

    return Source(np.tile(source.labels, tasks), source.image_shape, source.class_names, read)
