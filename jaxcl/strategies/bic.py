"""BiC: bias correction. Two numbers, fitted on rows held out from training, bring the new classes' logits to the old ones'.

Wu et al. 2019, Large scale incremental learning. With n old and m new classes, s = n / (n + m) and temperature T, all rows,
new and replayed, learn by (section 3)

    (1 - s) CE + s KL(softmax(old logits / T) || softmax(logits / T)), the second among the old classes

At the task's end alpha and beta minimise the CE of held-out rows, with the logits o of new classes replaced by
alpha * o + beta (section 4): the rows of the memory that are held out, every class weighing the same. A class keeps its
correction: it is applied in evaluation, and in later tasks to the logits of the old model and of the one that learns. (In
the paper the correction is that of the newest classes, and the network has to learn the earlier ones by distillation.)

A row is held out by its id, once for all: the buffer stores it, but no step learns from it. The paper splits the memory
anew in every task and descends the gradient; here alpha and beta are found by Newton's method, damped, from a normal prior
around (1, 0) that weighs as much as one row, so that a few rows told apart without error do not send them to infinity.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcl import losses
from jaxcl.check import refused
from jaxcl.strategies.base import Context, Descend, Descent, End, Outputs, Part, Share, Strategy, pooled_mean
from jaxcl.strategies.lwf import answers, snapshot
from jaxcl.types import PyTree

ROUNDS = 16  # of Newton's method


def bic(temperature: float = 2.0, held_out: float = 0.1) -> Strategy:
    if not 0 < held_out < 1:
        raise refused("strategies.bic.held_out", held_out, "a share between 0 and 1")

    def gradients(
        descend: Descend, params: PyTree, batch_stats: PyTree, parts: tuple[Part, ...], context: Context
    ) -> Descent:
        learned = [dataclasses.replace(part, valid=part.valid & ~is_held_out(part.id, held_out)) for part in parts]
        return descend(params, batch_stats, tuple(learned))

    def loss(params: PyTree, parts: Sequence[Part], context: Context) -> Share:
        s = jnp.sum(context.old) / jnp.sum(context.seen)

        def row_loss(part: Part) -> jax.Array:
            before = scores(answers(context, context.state["model"], part.image), context.state)
            now = scores(part.outputs, context.state)
            kept = losses.distillation(now, before, temperature, context.old) / temperature**2
            return (1 - s) * losses.cross_entropy(now, part.label, part.allowed) + s * kept

        return pooled_mean(row_loss, parts)

    def visit(params: PyTree, batch_stats: PyTree, part: Part, context: Context) -> PyTree:
        counted = part.valid & is_held_out(part.id, held_out)
        return derivatives(context, context.predict(params, batch_stats, part.image), part.label, counted)

    return Strategy(
        draws=1, loss=loss, own_bias="fits the bias itself, on rows held out",
        last_weights="fits its correction to the last weights at a task's end", head=True,
        gradients=gradients, by_parts=True, init=init, visit=visit, visits="buffer", end_task=end_task,
        rounds=ROUNDS, scores=scores,
    )  # fmt: skip


def init(params: PyTree, batch_stats: PyTree) -> PyTree:
    classes = params["head"]["kernel"].shape[1]
    return {"model": snapshot(params, batch_stats), "scale": jnp.ones(classes), "shift": jnp.zeros(classes)}


def scores(outputs: Outputs, state: PyTree) -> jax.Array:
    """The logits corrected, `[b, K]`."""
    return state["scale"] * outputs["logits"] + state["shift"]


def end_task(end: End) -> tuple[PyTree, PyTree]:
    model = snapshot(end.params, end.batch_stats)
    return end.params, {"model": model, **with_correction(newton_step(end.context, end.visited), end.context)}


def is_held_out(ident: jax.Array, share: float) -> jax.Array:
    """Whether rows `[b]` belong to the share held out: Fibonacci hashing, which spreads consecutive ids evenly."""
    return ident.astype(jnp.uint32) * jnp.uint32(2654435769) < jnp.uint32(share * 2**32)


def new_classes(context: Context) -> jax.Array:
    return context.present & ~context.old


def with_correction(theta: jax.Array, context: Context) -> PyTree:
    """The state's scale and shift with theta = (alpha, beta) for the new classes."""
    new = new_classes(context)
    return {name: jnp.where(new, x, context.state[name]) for name, x in zip(("scale", "shift"), theta, strict=True)}


def correction(context: Context) -> jax.Array:
    """(alpha, beta) of the new classes as fitted so far, float32 `[2]`."""
    k = jnp.argmax(new_classes(context))
    return jnp.stack([context.state["scale"][k], context.state["shift"][k]])


def derivatives(context: Context, outputs: Outputs, label: jax.Array, counted: jax.Array) -> PyTree:
    """Sums over the counted rows of each class: their number `[K]`, gradient `[K, 2]` and Hessian `[K, 2, 2]` of the CE
    among the classes seen, in (alpha, beta)."""

    def entropy(theta: jax.Array, logits: jax.Array, label: jax.Array) -> jax.Array:
        corrected = scores({"logits": logits}, with_correction(theta, context))
        return losses.cross_entropy(corrected[None], label[None], context.seen)[0]

    gradient, hessian = (
        jax.vmap(derive(entropy), (None, 0, 0))(correction(context), outputs["logits"], label)
        for derive in (jax.grad, jax.hessian)
    )
    member = jax.nn.one_hot(label, context.classes.shape[1]) * counted[:, None]
    return {
        "rows": jnp.sum(member, axis=0),
        "gradient": jnp.einsum("bk,bi->ki", member, gradient),
        "hessian": jnp.einsum("bk,bij->kij", member, hessian),
    }


def newton_step(context: Context, sums: PyTree) -> jax.Array:
    """The next (alpha, beta); as they were where no row of an old class, or none of a new one, was counted."""
    theta, there = correction(context), sums["rows"] > 0
    weight = there / jnp.maximum(sums["rows"], 1.0) / jnp.maximum(jnp.sum(there), 1)
    prior = 1 / jnp.maximum(jnp.sum(sums["rows"]), 1.0)
    gradient = weight @ sums["gradient"] + prior * (theta - jnp.array([1.0, 0.0]))
    hessian = jnp.einsum("k,kij->ij", weight, sums["hessian"]) + prior * jnp.eye(2)
    step = jnp.linalg.solve(hessian, gradient)
    ahead = theta - step / (1 + jnp.sqrt(gradient @ step))  # damped by the Newton decrement, so that no step overshoots
    fitted = jnp.any(there & context.old) & jnp.any(there & new_classes(context))
    return jnp.where(fitted, ahead, theta)
