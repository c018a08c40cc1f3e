"""Whether the right class is among the five ranked first."""

import jax

from jaxcl.losses import topk_correct
from jaxcl.metrics.base import EvalRows


def top5(rows: EvalRows) -> jax.Array:
    return topk_correct(rows.scores, rows.label, 5)
