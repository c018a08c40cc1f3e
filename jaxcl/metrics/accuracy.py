"""Whether the class ranked first is the right one, among all classes of the data set (class-incremental)."""

import jax

from jaxcl.losses import topk_correct
from jaxcl.metrics.base import EvalRows


def accuracy(rows: EvalRows) -> jax.Array:
    return topk_correct(rows.scores, rows.label)
