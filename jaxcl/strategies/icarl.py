"""iCaRL: old answers kept by distillation, rows classified by the nearest mean of the buffer's rows.

Rebuffi et al. 2017, iCaRL: incremental classifier and representation learning. All rows, new and replayed, learn by
binary cross-entropy, summed over the classes seen, of sigmoid(logits) with their labels for new classes and with
sigmoid(old model's logits) for old ones (section 2.3, algorithm 3). `data.loss_classes` restricts the labels' part alone: with
one head a task a row has no terms of the new classes of other tasks, and keeps those of all old ones. At a task's end the
features of the buffer's rows, scaled to length 1, are averaged class by class; evaluation ranks classes by the distance to
these means (algorithm 1).

The memory changes at a task's end only: of all rows of the task herding takes those whose mean features come nearest to
the mean of their class, and the old classes give up their last (algorithms 4 and 5). While a task lasts the memory thus
holds earlier tasks alone. A class that comes again in a later task keeps its exemplars. The paper trains on the union of
data and memory, as `buffer.replay = append` does; by default a draw of the memory joins every batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxcl.nearest_mean import Means, class_sums, means_of, nearness, unit
from jaxcl.strategies.base import Context, End, Outputs, Part, Share, Strategy, pooled_mean
from jaxcl.strategies.lwf import answers, snapshot
from jaxcl.types import PyTree


def icarl() -> Strategy:
    def loss(params: PyTree, parts: Sequence[Part], context: Context) -> Share:
        def row_loss(part: Part) -> jax.Array:
            before = jax.nn.sigmoid(answers(context, context.state["model"], part.image)["logits"])
            target = jnp.where(context.old, before, jax.nn.one_hot(part.label, before.shape[1]))
            entropy = optax.sigmoid_binary_cross_entropy(part.logits, target)
            counted = context.seen if part.allowed is None else context.seen & (context.old | part.allowed)
            return jnp.sum(jnp.where(counted, entropy, 0.0), axis=1)

        return pooled_mean(row_loss, parts)

    def init(params: PyTree, batch_stats: PyTree) -> PyTree:
        features, classes = params["head"]["kernel"].shape
        none = Means(jnp.zeros((classes, features)), jnp.zeros(classes, bool))
        return {"model": snapshot(params, batch_stats), **none._asdict()}

    def end_task(end: End) -> tuple[PyTree, PyTree]:
        model = snapshot(end.params, end.batch_stats)
        return end.params, {"model": model, **means_of(*end.visited)._asdict()}

    def scores(outputs: Outputs, state: PyTree) -> jax.Array:
        return nearness(Means(state["mean"], state["known"]), outputs["features"])

    return Strategy(
        draws=1,
        selection="icarl",
        alike=True,
        loss=loss,
        own_bias="learns each class apart, by binary cross-entropy",
        last_weights="takes its class means from the last weights at a task's end",
        head=True,
        init=init,
        visit=visit,
        visits="buffer",
        end_task=end_task,
        scores=scores,
    )


def visit(params: PyTree, batch_stats: PyTree, part: Part, context: Context) -> tuple[jax.Array, jax.Array]:
    """Sums of the rows' unit features by class, and their number, see `class_sums`."""
    features = unit(context.predict(params, batch_stats, part.image)["features"])
    return class_sums(features, part.label, part.valid, context.classes.shape[1])
