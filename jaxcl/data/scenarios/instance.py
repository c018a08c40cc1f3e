"""`instance`: new rows of the same classes. Each task has an equal part of every class, to within one row; of test rows too."""

import numpy as np

from jaxcl.data.scenarios.base import Made, Scenario, Split, Task, appear


def instance(split: Split) -> Made:
    train, test, rng = split.train, split.test, split.rng()
    tasks = split.number_of_tasks(min(len(train), len(test)), "the number of rows")
    parts = zip(_deal(train.labels, tasks, rng), _deal(test.labels, tasks, rng), strict=True)
    made = tuple(Task(t, appear(train.labels[a]), a, b) for t, (a, b) in enumerate(parts))
    return Scenario(made, train.num_classes), train, test


def _deal(labels: np.ndarray, tasks: int, rng: np.random.Generator) -> list[np.ndarray]:
    mixed = rng.permutation(len(labels))
    by_class = mixed[np.argsort(labels[mixed], kind="stable")]
    return [np.sort(by_class[t::tasks]) for t in range(tasks)]
