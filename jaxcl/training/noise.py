"""The gradient noise scale: how many rows a step may have before more of them bring little.

McCandlish et al. 2018, An empirical model of large-batch training, appendix A.1. With g the gradient of a step of B rows and
g_d those of its N devices with b = B / N rows each, there before and after the sum over the devices,

    |G|^2 = (B |g|^2 - b mean |g_d|^2) / (B - b)        the squared length of the true gradient
    S     = (mean |g_d|^2 - |g|^2) / (1 / b - 1 / B)    the summed variance of a row's gradient

are without bias, each by itself. Their means over many steps give B_noise = S / |G|^2, a useful batch: at B = B_noise a step
does half of what one with the true gradient would. B counts the valid rows of a step, new and replayed, as if every device had
as many. The g_d must be independent: where rows of several devices meet in a norm they are not, and |G|^2 comes out too small.
"""

from collections.abc import Sequence

import jax
import numpy as np
import optax
from jax import lax

from jaxcl.mesh import AXIS
from jaxcl.types import PyTree


def square_of(grads: PyTree) -> jax.Array:
    return optax.tree.vdot(grads, grads)


def estimates(grads: PyTree, squares: jax.Array, rows: jax.Array) -> dict[str, jax.Array]:
    """|G|^2 as "gradient_square" and S as "gradient_noise", of this step; not finite where it has no rows.

    Args:
      grads: g.
      squares: the sum over the devices of |g_d / N|^2, where the g_d / N add up to g.
      rows: B.
    """
    n = lax.axis_size(AXIS)
    large, small = square_of(grads), n * squares
    each = rows / n
    square = (rows * large - each * small) / (rows - each)
    return {"gradient_square": square, "gradient_noise": (small - large) / (1 / each - 1 / rows)}


def noise_scale(squares: Sequence[float], noises: Sequence[float]) -> float:
    """B_noise of the estimates of many steps; infinite where no gradient can be told from the noise."""
    found = np.array([squares, noises], float)
    square, noise = found[:, np.isfinite(found).all(0)].mean(1)
    return float(noise / square) if square > 0 else float("inf")
