"""How well a row is learnt; one file a metric, which evaluation averages over the test rows of each task.

A file NAME.py has a function `NAME(rows) -> [b]`, a score of each row: bool or float32, of what `EvalRows` says of the rows.
`NAME(rows, means)` is given the class means of the memory too, a `jaxcl.nearest_mean.Means` made with the weights that are
evaluated. One from outside the package is named `module.path:NAME` in `config.eval.metrics`. Summaries of the matrix that the
scores of all tasks make are in `jaxcl.summaries`.
"""

import inspect
from collections.abc import Callable

import jax

from jaxcl.metrics.base import EvalRows
from jaxcl.registry import Registry

__all__ = ["METRICS", "EvalRows", "asks_means"]

METRICS: Registry[Callable[..., jax.Array]] = Registry("eval.metrics", "jaxcl.metrics")


def asks_means(metric: Callable[..., jax.Array]) -> bool:
    """Whether the metric wants the class means of the memory."""
    return "means" in inspect.signature(metric).parameters
