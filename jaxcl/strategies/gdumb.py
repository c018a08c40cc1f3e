"""GDumb: while a task lasts, only fill the memory; at its end, train new weights on the memory alone.

Prabhu et al. 2020, GDumb: a simple approach that questions our progress in continual learning. Its greedy sampler is a
memory balanced by class (`buffer.policy`); `epochs` passes over what it holds, in batches of `buffer.representatives`.
"""

from jaxcl.check import POSITIVE, check
from jaxcl.strategies.base import Strategy


def gdumb(epochs: int = 30) -> Strategy:
    check("strategies.gdumb.epochs", epochs, POSITIVE)
    return Strategy(draws=1, rehearse=epochs)
