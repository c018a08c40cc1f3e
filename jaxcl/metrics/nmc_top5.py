"""Whether the mean of the right class is among the five nearest, see `nmc`."""

import jax

from jaxcl.losses import topk_correct
from jaxcl.metrics.base import EvalRows
from jaxcl.nearest_mean import Means, nearness


def nmc_top5(rows: EvalRows, means: Means) -> jax.Array:
    return topk_correct(nearness(means, rows.outputs["features"]), rows.label, 5)
