"""GDumb: while a task lasts, only fill the memory; at its end, train new weights on the memory alone.

Prabhu et al. 2020, GDumb: a simple approach that questions our progress in continual learning. It departs from the paper in

- the memory: its greedy balanced sampler is `buffer.policy = class_balanced`, which has to be asked for. The default,
  class_random, gives each of all K classes its share from the beginning;
- the epochs: the paper passes over the memory, every row once an epoch. Here an epoch is as many draws of
  `buffer.representatives` rows as make one pass. A draw has no row twice, two draws may have the same row: a row comes once an
  epoch in the mean;
- the training: learning rate and augmentation are those of the config, without the paper's warm restarts and CutMix.
"""

from jaxcl.check import POSITIVE, check
from jaxcl.strategies.base import Strategy


def gdumb(epochs: int = 30) -> Strategy:
    check("strategies.gdumb.epochs", epochs, POSITIVE)
    return Strategy(draws=1, rehearse=epochs)
