"""The mean absolute error of what is reconstructed, see `jaxcl.losses.reconstruction_error`."""

import jax

from jaxcl.errors import UserError
from jaxcl.losses import reconstruction_error
from jaxcl.metrics.base import EvalRows


def error(rows: EvalRows) -> jax.Array:
    if not rows.target:
        raise UserError("eval.metrics: error is not allowed where rows are classified")
    return reconstruction_error(rows.outputs, rows.target)
