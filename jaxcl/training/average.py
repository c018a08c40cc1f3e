"""An average of the weights along the steps, by which test rows are judged instead of the last weights.

Polyak & Juditsky 1992, Acceleration of stochastic approximation by averaging, in the exponential form of Tarvainen & Valpola
2017, Mean teachers are better role models. Behind step t of a task, t = 0, 1, ...,

    average <- average + max(1 - decay, 1 / (t + 1)) (weights - average)

So the first 1 / (1 - decay) steps give their plain mean, in which nothing is left of what was there before. A task begins its
average anew, as it does its learning rate; so does the review of a task (fine-tuning, `Strategy.rehearse`). What no step moves
is its own average, to the bit.

The running statistics of norm layers are averaged alike: they are then of the same steps as the weights, and no pass over the
data is needed (Izmailov et al. 2018, Averaging weights leads to wider optima, recompute them by one). Training itself, and all
that a strategy reads at a task's end, knows the last weights only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.types import PyTree


class Average(NamedTuple):
    """Like the fields of `TrainState` of these names."""

    params: PyTree
    batch_stats: PyTree


def averaged(average: Average, decay: float, task_step: jax.Array, params: PyTree, batch_stats: PyTree) -> Average:
    """The average with what step number `task_step` left; at 0 that alone."""
    share = jnp.maximum(1 - decay, 1 / (task_step + 1)).astype(jnp.float32)

    def with_new(mean: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(task_step == 0, x, mean + share * (x - mean))

    return jax.tree.map(with_new, average, Average(params, batch_stats))
