"""DER++: Dark Experience Replay, and the true labels of a second, independent draw.

Buzzega et al. 2020, Dark experience for general continual learning, equation 6:

    mean over new rows of CE + alpha * mean over draw 1 of (logits - stored)^2 + beta * mean over draw 2 of CE
"""

from collections.abc import Sequence

from jaxcl.strategies.base import Context, Part, Share, Strategy, cross_entropy, mean
from jaxcl.strategies.der import logit_distance, with_logits
from jaxcl.types import Number, PyTree


def der_pp(alpha: Number = 0.1, beta: Number = 0.5) -> Strategy:
    def loss(params: PyTree, parts: Sequence[Part], context: Context) -> Share:
        new, first, second = parts
        value = mean(cross_entropy(new), new.valid)
        value += alpha * mean(logit_distance(first), first.valid)
        value += beta * mean(cross_entropy(second), second.valid)
        return Share(value)

    return Strategy(draws=2, record=with_logits, stores_outputs=True, loss=loss, weights=(1.0, 0.0, beta))
