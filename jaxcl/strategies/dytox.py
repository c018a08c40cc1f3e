"""DyTox: binary cross-entropy, distillation from the model before the task, a divergence head; MixUp for DyTox+.

Douillard et al., DyTox: Transformers for Continual Learning with DYnamic TOken eXpansion, CVPR 2022, section 3.3, with what
the authors' program does where the paper is silent. With the K_o old of the K_s classes seen, of each row

    (1 - l) mean BCE over the classes seen + l / K_o KL(softmax(old logits) || softmax(logits)) + d mean BCE of the divergence

with l = K_o / K_s, the KL among old classes and with a temperature as in `lwf`, and the divergence head of the present task
telling its classes apart and all old ones as one. Tokens and classifiers of old tasks stay as they are, those of later tasks do
too until they begin, and evaluation ranks the classes seen. In the fine-tuning (`config.finetune`; freeze `patch_embed`,
`pos_embed` and the blocks) the loss is the binary cross-entropy alone, and all tasks' tokens and classifiers are trained. Rows
are selected by the embeddings of all tasks so far, by herding unless the config says otherwise.

`mixup` > 0 mixes every row of a batch with the one at its mirror place, of all devices, in a proportion drawn once a step from
Beta(mixup, mixup), and smooths the labels by `smoothing`. A row whose partner is padding stays as it is.

The binary cross-entropy is over the classes seen that `data.loss_classes` allows a row, l and the other terms are as above
whatever it is. MixUp, which gives a row labels of two tasks, is refused with one head a task.

With a model other than dytox it is the same without divergence and without anything held.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from ml_collections import ConfigDict

from jaxcl import losses
from jaxcl.buffer.exchange.base import pack
from jaxcl.check import NOT_NEGATIVE, POSITIVE, check, refused
from jaxcl.mesh import AXIS
from jaxcl.strategies.base import Context, Descend, Descent, End, Outputs, Part, Share, Strategy, pooled_mean
from jaxcl.strategies.lwf import answers, snapshot
from jaxcl.types import PyTree


def dytox(divergence: float = 0.1, temperature: float = 1.0, mixup: float = 0.0, smoothing: float = 0.1) -> Strategy:
    for name, value in {"divergence": divergence, "mixup": mixup, "smoothing": smoothing}.items():
        check(f"strategies.dytox.{name}", value, NOT_NEGATIVE)
    check("strategies.dytox.temperature", temperature, POSITIVE)

    def loss(params: PyTree, parts: Sequence[Part], context: Context) -> Share:
        def row_loss(part: Part) -> jax.Array:
            wanted = targets(part, context)
            value = binary(part.logits, wanted, context.seen if part.allowed is None else context.seen & part.allowed)
            if context.tuning:
                return value
            share = jnp.sum(context.old) / jnp.sum(context.seen)
            before = answers(context, context.state["model"], part.image)["logits"]
            kept = losses.distillation(part.logits, before, temperature, context.old)
            value = (1 - share) * value + share * kept / jnp.maximum(jnp.sum(context.old), 1)
            if divergence and "divergence" in part.outputs:
                value += divergence * apart(part.outputs["divergence"], wanted, context)
            return value

        return pooled_mean(row_loss, parts)

    def gradients(
        descend: Descend, params: PyTree, batch_stats: PyTree, parts: tuple[Part, ...], context: Context
    ) -> Descent:
        if mixup:
            assert context.key is not None
            share = jax.random.beta(context.key, mixup, mixup)
            pairs = zip(parts, mirrored(parts), strict=True)
            parts = tuple(mixed(part, its, share, smoothing, context.seen) for part, its in pairs)
        return descend(params, batch_stats, parts)

    def init(params: PyTree, batch_stats: PyTree) -> PyTree:
        heads = params["heads"]["bias"] if "heads" in params else params["head"]["bias"]
        return {"model": snapshot(params, batch_stats), "seen": jnp.ones(len(heads), bool)}

    def end_task(end: End) -> tuple[PyTree, PyTree]:
        return end.params, {"model": snapshot(end.params, end.batch_stats), "seen": end.context.seen}

    def scores(outputs: Outputs, state: PyTree) -> jax.Array:
        return jnp.where(state["seen"], outputs["logits"], -1e30)

    def fits(config: ConfigDict) -> None:
        if mixup and config.latent.below == "slow":
            raise refused(
                "strategies.dytox.mixup", mixup, "0 with latent.below = slow, which has no images of all rows"
            )
        if mixup and config.data.loss_classes == "task":
            raise refused(
                "strategies.dytox.mixup", mixup, "0 with data.loss_classes = task, which mixes labels of two tasks"
            )

    return Strategy(
        draws=1,
        selection="icarl",
        features=features,
        check=fits,
        loss=loss,
        own_bias="learns each class apart, by binary cross-entropy",
        gradients=gradients,
        init=init,
        end_task=end_task,
        scores=scores,
        alike=True,
        frozen=frozen,
    )


def targets(part: Part, context: Context) -> jax.Array:
    """What each row is to be called, `[b, K]`: mixed, if it was."""
    if isinstance(part.record, dict) and "mixed" in part.record:
        return part.record["mixed"]
    return jax.nn.one_hot(part.label, context.classes.shape[1])


def binary(logits: jax.Array, wanted: jax.Array, counted: jax.Array) -> jax.Array:
    """Each row's mean binary cross-entropy over the outputs that are `counted` (bool `[K]` or `[b, K]`)."""
    entropy = optax.sigmoid_binary_cross_entropy(logits, wanted)
    number = jnp.maximum(jnp.sum(counted, axis=-1), 1)  # only a row that is not valid has none
    return jnp.sum(jnp.where(counted, entropy, 0.0), axis=1) / number


def apart(logits: jax.Array, wanted: jax.Array, context: Context) -> jax.Array:
    """Each row's mean binary cross-entropy `[b]` of the present task's divergence head; 0 in the first task.

    Args:
      logits: `[b, T, M + 1]`, of each task: all earlier classes as one, then the task's own in their order.
      wanted: `[b, K]`.
    """
    owner, tasks = task_of_class(context.classes), len(context.classes)
    own = np.full((tasks, logits.shape[2] - 1), -1)
    for task in range(tasks):
        classes = np.flatnonzero(owner == task)
        own[task, : len(classes)] = classes
    own_now = jnp.asarray(own)[context.task]
    there = own_now >= 0
    old = jnp.sum(jnp.where(context.old, wanted, 0.0), axis=1, keepdims=True)
    wanted = jnp.concatenate([old, jnp.where(there, wanted[:, own_now], 0.0)], axis=1)
    value = binary(logits[:, context.task], wanted, jnp.concatenate([jnp.ones(1, bool), there]))
    return jnp.where(context.task > 0, value, 0.0)


def mirrored(parts: Sequence[Part]) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Of each part the (image, label, valid) at the mirror place of its batch of all devices; one message."""
    devices = lax.axis_size(AXIS)
    rows = [(part.image[::-1], part.label[::-1], part.valid[::-1]) for part in parts]
    packed, unpacked = pack(jax.tree.map(lambda *x: jnp.concatenate(x), *rows))
    came = unpacked(lax.ppermute(packed, AXIS, [(i, devices - 1 - i) for i in range(devices)]))
    borders = np.cumsum([len(part.label) for part in parts])[:-1]
    return list(zip(*(jnp.split(x, borders) for x in came), strict=True))


def mixed(part: Part, its: Sequence[jax.Array], share: jax.Array, smoothing: float, seen: jax.Array) -> Part:
    """The rows, each mixed with its partner; their labels go to the record.

    Args:
      its: the partners, see `mirrored`.
      share: of a row itself, the same on every device.
      smoothing: the share of a label that is spread over the classes `seen`, bool `[K]`.
    """
    image, label, valid = its
    mine, other = (
        jax.nn.one_hot(x, len(seen)) * (1 - smoothing) + smoothing * seen / jnp.sum(seen) for x in (part.label, label)
    )
    mix = share * part.image + (1 - share) * image
    wanted = jnp.where(valid[:, None], share * mine + (1 - share) * other, mine)
    record = {**(part.record or {}), "mixed": wanted}
    return dataclasses.replace(part, image=jnp.where(valid[:, None, None, None], mix, part.image), record=record)


def features(outputs: Outputs, context: Context) -> jax.Array:
    """The embeddings of the tasks so far, those to come as zeros."""
    if "embeddings" not in outputs:
        return outputs["features"]
    x = outputs["embeddings"]
    begun = jnp.arange(x.shape[1]) <= context.task
    return jnp.where(begun[:, None], x, 0.0).reshape(len(x), -1)


def frozen(params: PyTree, context: Context) -> PyTree:
    """The tokens and classifiers of later tasks, and but in fine-tuning of earlier ones; divergence heads but the present."""
    still = jax.tree.map(lambda w: jnp.bool_(False), params)
    if "tokens" not in params:
        return still
    task, owner = jnp.arange(len(params["tokens"])), jnp.asarray(task_of_class(context.classes))

    def not_now(task: jax.Array) -> jax.Array:
        return (task > context.task) | (task < (0 if context.tuning else context.task))

    still["tokens"] = not_now(task)[:, None]
    still["heads"] = {
        "scale": not_now(task)[:, None],
        "shift": not_now(task)[:, None],
        "kernel": not_now(owner)[None, :],
        "bias": not_now(owner),
    }
    if "divergence" in params:
        other = (task != context.task) | (task == 0) | context.tuning  # the first task has nothing to diverge from
        each = jnp.repeat(other, params["divergence"]["bias"].shape[0] // len(task))
        still["divergence"] = {"scale": other[:, None], "shift": other[:, None], "kernel": each[None, :], "bias": each}
    return still


def task_of_class(classes: np.ndarray) -> np.ndarray:
    """Of each class the first task that has it, `[K]`, -1 where none has; `classes` is bool `[T, K]`."""
    return np.where(classes.any(axis=0), np.argmax(classes, axis=0), -1)
