"""Elastic weight consolidation: a quadratic pull towards old weights, each as strong as the task's Fisher information.

Kirkpatrick et al. 2017 (one penalty a task); Schwarz et al. 2018, Progress & compress (`online`: one running penalty with
decay `gamma`, centred at the newest weights). The loss is

    mean CE + strength * sum_i F_i (w_i - w*_i)^2

and, for a penalty a task, the sum of these over the tasks, which is again a quadratic: keeping sum_t F_t and
sum_t F_t w*_t gives its exact gradient in memory that does not grow with the tasks.

The Fisher diagonal is the mean over the task's rows (x, y) of p(y|x) (d log p(y|x) / dw)^2, the labelled term of the
expectation over y, as in Mammoth, with p among the classes that take part in training (`data.loss_classes`). Rows are
differentiated one by one, so a batch costs the memory of one gradient.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl import losses
from jaxcl.strategies.base import Context, End, Part, Share, Strategy, cross_entropy, mean, whole
from jaxcl.types import PyTree


def ewc(strength: float = 0.7, gamma: float = 1.0, online: bool = True) -> Strategy:
    def loss(params: PyTree, parts: Sequence[Part], context: Context) -> Share:
        (new,) = parts
        fisher, pulled = context.state["fisher"], context.state["pulled"]
        # The penalty but for a constant, which moves the loss that is reported and no gradient.
        penalty = jax.tree.map(lambda w, f, p: jnp.sum(f * w * w - 2 * p * w), params, fisher, pulled)
        total = strength * jnp.stack(jax.tree.leaves(penalty)).sum()
        return Share(mean(cross_entropy(new), new.valid) + whole(total))

    def init(params: PyTree, batch_stats: PyTree) -> PyTree:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"fisher": zeros, "pulled": zeros}

    def end_task(end: End) -> tuple[PyTree, PyTree]:
        squares, rows = end.visited
        new = jax.tree.map(lambda s: s / jnp.maximum(rows, 1.0), squares)
        old, decay = end.context.state, gamma if online else 1.0
        fisher = jax.tree.map(lambda f, n: decay * f + n, old["fisher"], new)
        if online:
            pulled = jax.tree.map(jnp.multiply, fisher, end.params)
        else:
            pulled = jax.tree.map(lambda p, n, w: p + n * w, old["pulled"], new, end.params)
        return end.params, {"fisher": fisher, "pulled": pulled}

    return Strategy(loss=loss, init=init, visit=fisher_sum, end_task=end_task)


def fisher_sum(params: PyTree, batch_stats: PyTree, part: Part, context: Context) -> tuple[PyTree, jax.Array]:
    """Sum over the valid rows of p(y|x) (d log p(y|x) / dw)^2, and their number."""

    def log_likelihood(params: PyTree, image: jax.Array, label: jax.Array, allowed: jax.Array | None) -> jax.Array:
        logits = context.predict(params, batch_stats, image[None])["logits"]
        return -losses.cross_entropy(logits, label[None], allowed)[0]

    def add(sums: PyTree, row: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> tuple[PyTree, None]:
        image, label, valid, allowed = row
        value, grads = jax.value_and_grad(log_likelihood)(params, image, label, allowed)
        weight = jnp.where(valid, jnp.exp(value), 0.0)
        return jax.tree.map(lambda s, g: s + weight * jnp.square(g), sums, grads), None

    sums, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, params), (part.image, part.label, part.valid, part.allowed))
    return sums, jnp.sum(part.valid, dtype=jnp.float32)
