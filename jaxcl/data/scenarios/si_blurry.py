"""`si_blurry`: classes fall to tasks at random. Some stay disjoint; of the others a share of rows is scattered. Moon et al.
2023."""

import numpy as np

from jaxcl.data.scenarios.base import Made, Split, class_incremental, scatter
from jaxcl.data.source import rows_of_each


def si_blurry(split: Split) -> Made:
    """Section 3 of the paper: borders between tasks are drawn among the shuffled classes, for those that stay disjoint and for
    the others apart. Before that every task gets one class, so that none is left without."""
    train, test, rng, k = split.train, split.test, split.rng(), split.train.num_classes
    tasks = split.number_of_tasks(k, "the number of classes")
    order, number = rng.permutation(k), round(split.disjoint * k)
    first = rng.permutation(k)[:tasks]
    owner = np.zeros(k, int)
    for part in (order[:number], order[number:]):
        rest = part[~np.isin(part, first)]
        borders = np.sort(rng.integers(0, len(rest) + 1, tasks - 1))
        owner[rest] = np.searchsorted(borders, np.arange(len(rest)), side="right")
    owner[first] = np.arange(tasks)
    classes = [part.tolist() for part in rows_of_each(owner, tasks)]
    blurry = np.ones(k, bool)
    blurry[order[:number]] = False
    by_class = class_incremental(train.labels, test.labels, k, classes)
    return scatter(by_class, train.labels, split.scattered, blurry, rng), train, test
