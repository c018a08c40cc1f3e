"""`blurry`: as `class`, but a share of each class's train rows is scattered over the other tasks. Bang et al. 2021."""

import numpy as np

from jaxcl.data.scenarios.base import Made, Split, scatter


def blurry(split: Split) -> Made:
    every = np.ones(split.train.num_classes, bool)
    made = scatter(split.by_class(), split.train.labels, split.scattered, every, split.rng())
    return made, split.train, split.test
