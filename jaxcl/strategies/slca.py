"""SLCA: a slow backbone, class Gaussians of its features, and a classifier aligned on draws from them. No memory of rows.

Zhang et al. 2023, SLCA: slow learner with classifier alignment for continual learning on a pre-trained model, section 4. The
backbone learns at a hundredth of the head's rate, which `optimizer.scales = {"backbone": 0.01}` asks for, and all rows by their
cross-entropy among the classes of the present task. At a task's end the mean and covariance of each class's features are taken,
and from the second task on the head alone is trained on draws of every class seen, by stochastic gradient descent with
momentum:

    f ~ N(s mu_k, Sigma_k),                      s = 0.9 + 0.1 (task of k) / (present task)
    CE(logits / (temperature * mean norm)),      the norms being those of each task's logits

As in the authors' code each epoch has `draws` fresh draws of a class, shuffled, and takes them in batches of as many; the rate
falls by a cosine over the epochs. A class that comes again in a later task has the moments of all its rows, as the network then
was. The moments are sums over all devices, so every device draws the same rows.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl import losses
from jaxcl.check import COUNT, NOT_NEGATIVE, POSITIVE, SEED, check, one_of
from jaxcl.nearest_mean import class_sums
from jaxcl.strategies.base import Context, End, Part, Share, Strategy, pooled_mean
from jaxcl.types import Number, PyTree

MOMENTUM, DECAY = 0.9, 5e-4
JITTER = 1e-4  # added to every variance
COVARIANCES = ("full", "diagonal")


def slca(
    epochs: int = 5,
    rate: Number = 0.01,
    draws: int = 256,
    temperature: float = 0.1,
    covariance: str = "full",
    seed: int = 0,
) -> Strategy:
    """Options: `epochs`, `rate` and `draws` of the alignment; `temperature` 0 leaves the logits as they are; `covariance`
    "diagonal" keeps variances alone, D numbers a class instead of D * D."""
    for name, value, rule in (
        ("epochs", epochs, NOT_NEGATIVE),
        ("rate", rate, POSITIVE),
        ("draws", draws, COUNT),
        ("temperature", temperature, NOT_NEGATIVE),
        ("covariance", covariance, one_of(COVARIANCES)),
        ("seed", seed, SEED),
    ):
        check(f"strategies.slca.{name}", value, rule)
    full = covariance == "full"

    def init(params: PyTree, batch_stats: PyTree) -> PyTree:
        features, classes = params["head"]["kernel"].shape
        square = (classes, features, features) if full else (classes, features)
        return {"count": jnp.zeros(classes), "sum": jnp.zeros((classes, features)), "square": jnp.zeros(square)}

    def visit(params: PyTree, batch_stats: PyTree, part: Part, context: Context) -> PyTree:
        features = context.predict(params, batch_stats, part.image)["features"]
        classes = context.classes.shape[1]
        total, count = class_sums(features, part.label, part.valid, classes)
        if not full:
            return {"count": count, "sum": total, "square": class_sums(features**2, part.label, part.valid, classes)[0]}
        member = jax.nn.one_hot(part.label, classes) * part.valid[:, None]
        square = jnp.einsum("bk,bi,bj->kij", member, features, features, precision=lax.Precision.HIGHEST)
        return {"count": count, "sum": total, "square": square}

    def end_task(end: End) -> tuple[PyTree, PyTree]:
        sums, context = jax.tree.map(jnp.add, end.context.state, end.visited), end.context
        options: Any = {"epochs": int(epochs), "rate": rate, "draws": draws, "temperature": temperature}
        key = jax.random.fold_in(jax.random.key(seed), context.task)
        head = lax.cond(
            context.task > 0,
            lambda head: aligned(head, *moments(sums), context, key, **options),
            lambda head: head,
            end.params["head"],
        )
        return {**end.params, "head": head}, sums

    return Strategy(
        loss=loss,
        own_bias="classifies among the classes of the present task",
        last_weights="aligns the head of the last weights at a task's end",
        head=True,
        init=init,
        visit=visit,
        end_task=end_task,
    )


def loss(params: PyTree, parts: Sequence[Part], context: Context) -> Share:
    def row_loss(part: Part) -> jax.Array:
        allowed = context.present if part.allowed is None else context.present & part.allowed
        return losses.cross_entropy(part.logits, part.label, allowed)

    return pooled_mean(row_loss, parts)


def moments(sums: PyTree) -> tuple[jax.Array, jax.Array]:
    """Of each class the mean `[K, D]`, and what turns standard normal numbers into its deviations: the Cholesky factor of the
    covariance, `[K, D, D]`, or standard deviations, `[K, D]`. A class with fewer than two rows has the jitter's alone."""
    count = sums["count"][:, None]
    mean = sums["sum"] / jnp.maximum(count, 1)
    if sums["square"].ndim == 2:
        variance = (sums["square"] - count * mean**2) / jnp.maximum(count - 1, 1)
        return mean, jnp.sqrt(jnp.maximum(variance, 0) + JITTER)
    count = count[..., None]
    covariance = (sums["square"] - count * mean[:, :, None] * mean[:, None, :]) / jnp.maximum(count - 1, 1)
    return mean, jnp.linalg.cholesky(covariance + JITTER * jnp.eye(mean.shape[1]))


def aligned(
    head: PyTree,
    mean: jax.Array,
    spread: jax.Array,
    context: Context,
    key: jax.Array,
    *,
    epochs: int,
    rate: Number,
    draws: int,
    temperature: float,
) -> PyTree:
    """The head, trained on draws of the classes seen; `mean` and `spread` as `moments` gives them."""
    classes, dim = mean.shape
    first = np.argmax(context.classes, axis=0)  # the task in which a class comes first
    mean = mean * (0.9 + 0.1 * (first + 1) / (context.task + 1))[:, None]
    label = jnp.repeat(jnp.arange(classes), draws)

    def batch_loss(head: PyTree, features: jax.Array, label: jax.Array) -> jax.Array:
        logits = features @ head["kernel"] + head["bias"]
        if temperature:
            logits = logits / (temperature * task_norm(logits, context)[:, None])
        return jnp.mean(losses.cross_entropy(logits, label, context.seen))

    def epoch(carry: tuple[PyTree, PyTree], number: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
        draw_key, order_key = jax.random.split(jax.random.fold_in(key, number))
        normal = jax.random.normal(draw_key, (classes, draws, dim))
        deviation = normal * spread[:, None] if spread.ndim == 2 else jnp.einsum("kdj,kij->kdi", normal, spread)
        features = (mean[:, None] + deviation).reshape(-1, dim)
        # Shuffled, those of classes that are not seen behind all others: their batches are passed by.
        place = jax.random.uniform(order_key, label.shape) + ~context.seen[label]
        order = jnp.argsort(place).reshape(classes, draws)
        now = rate * (1 + jnp.cos(jnp.pi * number / epochs)) / 2

        def step(carry: tuple[PyTree, PyTree], rows: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
            def descend(carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
                head, momentum = carry
                grads = jax.grad(batch_loss)(head, features[rows], label[rows])
                momentum = jax.tree.map(lambda m, g, w: MOMENTUM * m + g + DECAY * w, momentum, grads, head)
                return jax.tree.map(lambda w, m: w - now * m, head, momentum), momentum

            return lax.cond(context.seen[label[rows[0]]], descend, lambda carry: carry, carry), None

        return lax.scan(step, carry, order)

    (head, _), _ = lax.scan(epoch, (head, jax.tree.map(jnp.zeros_like, head)), jnp.arange(epochs))
    return head


def task_norm(logits: jax.Array, context: Context) -> jax.Array:
    """The mean, over the tasks so far, of the norm of a row's logits of that task's classes, `[b]`."""
    squares = jnp.square(logits) @ jnp.asarray(context.classes, jnp.float32).T  # [b, T]
    so_far = jnp.arange(len(context.classes)) <= context.task
    norms = jnp.sqrt(squares + 1e-14)  # with a gradient at 0
    return jnp.sum(jnp.where(so_far, norms, 0.0), axis=1) / jnp.sum(so_far)
