"""BiC: bias correction. Two numbers, fitted on rows held out from training, bring the new classes' logits to the old ones'.

Wu et al. 2019, Large scale incremental learning. With n old and m new classes, s = n / (n + m) and temperature T, all rows,
new and replayed, learn by (section 3)

    (1 - s) CE + s KL(softmax(old logits / T) || softmax(logits / T)), the second among the old classes

At the task's end alpha and beta minimise the CE of held-out rows, with the logits o of new classes replaced by
alpha * o + beta (section 4): the rows of the memory that are held out, every class weighing the same. Evaluation and the
old model of the next task use the logits so corrected.

A row is held out by its id, once for all: the buffer stores it, but no step learns from it. The paper splits the memory
anew in every task and descends the gradient; here alpha and beta are found by Newton's method, damped, with a slight pull to
(1, 0) so that rows told apart without error do not send them to infinity.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcl import losses
from jaxcl.errors import UserError
from jaxcl.strategies.base import (
    Context,
    Descend,
    Descent,
    End,
    Outputs,
    Part,
    PyTree,
    Share,
    Strategy,
    cross_entropy,
    pooled_mean,
)
from jaxcl.strategies.lwf import answers, snapshot

ROUNDS = 16  # of Newton's method
PULL = 1e-2  # its half times the squared distance of (alpha, beta) to (1, 0) joins the CE


def bic(temperature: float = 2.0, held_out: float = 0.1) -> Strategy:
    if not 0 < held_out < 1:
        raise UserError(f"strategies.bic.held_out: {held_out} is not allowed, give a share between 0 and 1")

    def gradients(
        descend: Descend, params: PyTree, batch_stats: PyTree, parts: tuple[Part, ...], context: Context
    ) -> Descent:
        learned = [dataclasses.replace(part, valid=part.valid & ~is_held_out(part.id, held_out)) for part in parts]
        return descend(params, batch_stats, tuple(learned))

    def loss(params: PyTree, parts: Sequence[Part], context: Context) -> Share:
        s = jnp.sum(context.old) / jnp.sum(context.seen)

        def row_loss(part: Part) -> jax.Array:
            before = scores(answers(context, context.state["model"], part.image), context.state)
            kept = losses.distillation(part.logits, before, temperature, context.old) / temperature**2
            return (1 - s) * cross_entropy(part) + s * kept

        return pooled_mean(row_loss, parts)

    def visit(params: PyTree, batch_stats: PyTree, part: Part, context: Context) -> PyTree:
        logits = context.predict(params, batch_stats, part.image)["logits"]
        counted = part.valid & is_held_out(part.id, held_out)
        return derivatives(fit_so_far(context), new_classes(context), logits, part.label, counted, context.seen)

    return Strategy(
        draws=1, loss=loss, gradients=gradients, init=init, visit=visit, visits="buffer", end_task=end_task,
        rounds=ROUNDS, scores=scores,
    )  # fmt: skip


def init(params: PyTree, batch_stats: PyTree) -> PyTree:
    classes = params["head"]["kernel"].shape[1]
    return {"model": snapshot(params, batch_stats), "theta": identity(), "new": jnp.zeros(classes, bool)}


def scores(outputs: Outputs, state: PyTree) -> jax.Array:
    return correct(state["theta"], state["new"], outputs["logits"])


def end_task(end: End) -> tuple[PyTree, PyTree]:
    theta = newton_step(fit_so_far(end.context), end.visited, end.context.old)
    model = snapshot(end.params, end.batch_stats)
    return end.params, {"model": model, "theta": theta, "new": new_classes(end.context)}


def is_held_out(ident: jax.Array, share: float) -> jax.Array:
    """Whether rows `[b]` belong to the share held out: Fibonacci hashing, which spreads consecutive ids evenly."""
    return ident.astype(jnp.uint32) * jnp.uint32(2654435769) < jnp.uint32(share * 2**32)


def identity() -> jax.Array:
    """(alpha, beta) that correct nothing."""
    return jnp.array([1.0, 0.0])


def new_classes(context: Context) -> jax.Array:
    return context.present & ~context.old


def fit_so_far(context: Context) -> jax.Array:
    """(alpha, beta) for the new classes of this task; a fit of earlier ones is no beginning."""
    begun = jnp.all(context.state["new"] == new_classes(context))
    return jnp.where(begun, context.state["theta"], identity())


def correct(theta: jax.Array, new: jax.Array, logits: jax.Array) -> jax.Array:
    """`[..., K]` with alpha * o + beta for the `new` classes, theta = (alpha, beta)."""
    return jnp.where(new, theta[0] * logits + theta[1], logits)


def derivatives(
    theta: jax.Array, new: jax.Array, logits: jax.Array, label: jax.Array, counted: jax.Array, seen: jax.Array
) -> PyTree:
    """Sums over the counted rows of each class: their number `[K]`, gradient `[K, 2]` and Hessian `[K, 2, 2]` of the CE
    among the classes seen, in theta."""

    def entropy(theta: jax.Array, logits: jax.Array, label: jax.Array) -> jax.Array:
        return losses.cross_entropy(correct(theta, new, logits)[None], label[None], seen)[0]

    gradient, hessian = (
        jax.vmap(derive(entropy), (None, 0, 0))(theta, logits, label) for derive in (jax.grad, jax.hessian)
    )
    member = jax.nn.one_hot(label, len(new)) * counted[:, None]
    return {
        "rows": jnp.sum(member, axis=0),
        "gradient": jnp.einsum("bk,bi->ki", member, gradient),
        "hessian": jnp.einsum("bk,bij->kij", member, hessian),
    }


def newton_step(theta: jax.Array, sums: PyTree, old: jax.Array) -> jax.Array:
    """The next theta; (1, 0) where no row of an old class, or none of a new one, was counted."""
    there = sums["rows"] > 0
    weight = there / jnp.maximum(sums["rows"], 1.0) / jnp.maximum(jnp.sum(there), 1)
    gradient = weight @ sums["gradient"] + PULL * (theta - identity())
    hessian = jnp.einsum("k,kij->ij", weight, sums["hessian"]) + PULL * jnp.eye(2)
    step = jnp.linalg.solve(hessian, gradient)
    ahead = theta - step / (1 + jnp.sqrt(gradient @ step))  # damped by the Newton decrement, so that no step overshoots
    return jnp.where(jnp.any(there & old) & jnp.any(there & ~old), ahead, identity())
