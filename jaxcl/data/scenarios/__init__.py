"""Scenarios: a labelled set split into tasks that arrive one after another; one file a scenario.

A file NAME.py has a function `NAME(split: Split) -> (Scenario, train, test)`; the sources are those that the tasks' rows
number. (`class` is a word of Python's: its file is `_class.py`.)

A task is row numbers into a source, no copy of its images. Which rows, which classes, which permutation and angle are
determined by the data and a seed. One pass over any of them (`epochs` = 1) is an online stream; one head a task
(task-incremental) is `data.loss_classes` = "task".
"""

from collections.abc import Callable, Sequence

import numpy as np

from jaxcl.check import between, check, refused
from jaxcl.data.scenarios._class import class_
from jaxcl.data.scenarios.base import Made, Scenario, Split, Task, Tasks, class_incremental
from jaxcl.data.source import Source
from jaxcl.registry import Registry

__all__ = ["SCENARIOS", "Scenario", "Split", "Task", "class_incremental", "make_scenario"]

MOST_TASKS = 10_000  # every pair of tasks has a number in the accuracy matrix
_MOST_CELLS = 2**30  # of the table of tasks and classes, a byte each

SCENARIOS: Registry[Callable[[Split], Made]] = Registry("data.scenario", __name__)
SCENARIOS.register(class_, "class")


def make_scenario(
    train: Source,
    test: Source,
    kind: str = "class",
    tasks: Tasks = 5,
    *,
    class_order_seed: int | None = None,
    seed: int = 0,
    scattered: float = 0.1,
    disjoint: float = 0.5,
) -> Made:
    """Splits a data set into tasks; the sources returned are those that the tasks' rows number.

    Args:
      train, test: the data.
      kind: one of `SCENARIOS`, or `module.path:name`.
      tasks: how many; for "class", "domain" and "blurry" also the classes of each, see `class_incremental`.
      class_order_seed: of "class", "domain" and "blurry", see `class_incremental`.
      seed: of permutations, angles and scattered rows.
      scattered: the share of rows that "blurry" and "si_blurry" scatter, of the classes that are not disjoint; 0..1.
      disjoint: the share of classes that stay within their task in "si_blurry"; 0..1.

    Raises:
      UserError: an unknown kind, a value out of range, or an impossible split.
    """
    make = SCENARIOS[kind]
    check("data.scattered", scattered, between(0, 1))
    check("data.disjoint", disjoint, between(0, 1))
    number = tasks if isinstance(tasks, int | np.integer) else len(tasks) if isinstance(tasks, Sequence) else 1
    most = min(MOST_TASKS, _MOST_CELLS // train.num_classes)
    if number > most:
        raise refused("data.tasks", tasks if isinstance(tasks, int | np.integer) else number, f"at most {most} tasks")
    return make(Split(train, test, kind, tasks, class_order_seed, seed, scattered, disjoint))
