"""Learning without Forgetting: the new model keeps the old one's answers on the new data; needs no memory of rows.

Li & Hoiem 2017, equations 2-4, with a single head. From the second task on

    mean CE + alpha * T^2 * mean over rows of KL(softmax(old logits / T) || softmax(logits / T)), among the old classes

T^2 keeps the gradient's scale whatever the temperature T (Hinton et al. 2015). The paper first trains the new classes' part of
the head alone until it converges (its warm-up, section 3), then all weights; here all weights are trained from the first step.
"""

from collections.abc import Sequence

import jax

from jaxcl import losses
from jaxcl.strategies.base import Context, End, Outputs, Part, Share, Strategy, cross_entropy, mean
from jaxcl.types import Number, PyTree


def lwf(alpha: Number = 1.0, temperature: Number = 2.0) -> Strategy:
    def loss(params: PyTree, parts: Sequence[Part], context: Context) -> Share:
        (new,) = parts
        old = answers(context, context.state, new.image)["logits"]
        kept = losses.distillation(new.logits, old, temperature, context.old)
        return Share(mean(cross_entropy(new), new.valid) + alpha * mean(kept, new.valid))

    return Strategy(loss=loss, init=snapshot, end_task=keep_model)


def snapshot(params: PyTree, batch_stats: PyTree) -> PyTree:
    """The model as it is, to be asked later."""
    return params, batch_stats


def answers(context: Context, model: PyTree, images: jax.Array) -> Outputs:
    """What a `snapshot` says of these images."""
    params, batch_stats = model
    return context.predict(params, batch_stats, images)


def keep_model(end: End) -> tuple[PyTree, PyTree]:
    """Makes the model at the task's end the old model of the next."""
    return end.params, (end.params, end.batch_stats)
