"""Whether the nearest class mean of the memory is that of the right class, among all classes of the data set.

The classifier is iCaRL's (Rebuffi et al. 2017), see `jaxcl.nearest_mean`, whatever the strategy: the means are those of the
features of the stored rows under the weights that are evaluated.
"""

import jax

from jaxcl.losses import topk_correct
from jaxcl.metrics.base import EvalRows
from jaxcl.nearest_mean import Means, nearness


def nmc(rows: EvalRows, means: Means) -> jax.Array:
    return topk_correct(nearness(means, rows.outputs["features"]), rows.label)
