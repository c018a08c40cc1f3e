"""As accuracy, where only the classes of the row's task are candidates (task-incremental)."""

import jax

from jaxcl.losses import topk_correct
from jaxcl.metrics.base import EvalRows


def accuracy_in_task(rows: EvalRows) -> jax.Array:
    return topk_correct(rows.scores, rows.label, class_mask=rows.task_classes)
