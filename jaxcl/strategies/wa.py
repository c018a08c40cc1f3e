"""Weight aligning: after each task, the new classes' weights in the head are scaled to the norm of the old ones'.

Zhao et al. 2020, Maintaining discrimination and fairness in class incremental learning, equations 6-8: a correction of
the classifier's bias towards new classes, on top of experience replay. With w_k the head's weights of class k,

    w_new <- w_new * (mean norm of old w_k) / (mean norm of new w_k)

The paper's distillation, and its restriction to weights that are not negative, are left out. It supposes new classes of the
larger norms, as many epochs beside a small memory leave them; where replay is as large as the new data it is the old classes
that have them, and the same formula then favours the new.
"""

import jax
import jax.numpy as jnp

from jaxcl.strategies.base import End, Strategy
from jaxcl.types import PyTree


def wa() -> Strategy:
    def end_task(end: End) -> tuple[PyTree, PyTree]:
        old = end.context.old
        kernel = align(end.params["head"]["kernel"], old, end.context.present & ~old)
        return {**end.params, "head": {**end.params["head"], "kernel": kernel}}, end.context.state

    aligned = "aligns the head of the last weights at a task's end"
    return Strategy(draws=1, alike=True, head=True, last_weights=aligned, end_task=end_task)


def align(kernel: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """`kernel` `[D, K]` with the columns of the `new` classes scaled; as it is where there are no old or no new ones."""
    norm = jnp.linalg.norm(kernel, axis=0)

    def mean_over(classes: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(classes, norm, 0.0)) / jnp.maximum(jnp.sum(classes), 1)

    scale = jnp.where(jnp.any(old) & jnp.any(new), mean_over(old) / jnp.maximum(mean_over(new), 1e-12), 1.0)
    return jnp.where(new, scale * kernel, kernel)
