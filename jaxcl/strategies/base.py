"""The interface of a strategy: what a method of continual learning adds to plain training.

A strategy is a `Strategy`, a tuple of pure functions bound to their options; all but a few keep their defaults. Its
functions run on every device inside one `shard_map` over the mesh axis `AXIS`, on that device's rows. One rule makes
them mean the same on any number of devices: **a loss is this device's share of the global loss**, and the step adds
the shares (and their gradients) up. `mean`, `pooled_mean` and `whole` make shares; rows that are not valid weigh nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from ml_collections import ConfigDict

from jaxcl import losses
from jaxcl.data.scenarios import Scenario
from jaxcl.errors import UserError
from jaxcl.mesh import AXIS
from jaxcl.types import Number, PyTree

Outputs = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of one origin: the new rows of a batch, or those of one draw from the buffer. b of them on this device.

    Attributes:
      image: float32 `[b, H, W, C]`, augmented and normalised; or where the memory holds activations and new rows are images
        (`latent.below = slow`) a `Latent` for rows of the memory.
      label: int32 `[b]`.
      valid: bool `[b]`; a row that is not valid holds anything and weighs nothing.
      id: int32 `[b]`, each row's number in the data set, by which a row is known again; of invalid rows anything.
      record: what the buffer stored of each row, leaves `[b, ...]`; None for new rows.
      allowed: bool `[b, K]`, the classes that take part in each row's classification; None for all.
      outputs: of the model: {"logits": float32 `[b, K]`, "features": float32 `[b, D]`}, or the tensors of `target` as the
        model reconstructs them; {} before the forward pass.
      target: float32 `[b, ...]` by name, what the model is to reconstruct of each row; {} where it is to classify.
      weight: of each of these rows in a mean over all rows, see `pooled_mean`; or of their part in a sum of means over parts,
        see `Strategy.weights`.
      share: float32 `[K]`, the share of each class among the rows of this origin; None unless the prior is corrected.
      log_prior: float32 `[K]`, the logarithm of the expected rows of each class in a pass over several parts, but for a
        constant, see `jaxcl.training.prior`; None likewise.
    """

    image: Any
    label: jax.Array
    valid: jax.Array
    id: jax.Array
    record: PyTree = None
    allowed: jax.Array | None = None
    outputs: Outputs = dataclasses.field(default_factory=dict)
    target: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    weight: float | jax.Array = 1.0
    share: jax.Array | None = None
    log_prior: jax.Array | None = None

    @property
    def logits(self) -> jax.Array:
        return self.outputs["logits"]

    @property
    def features(self) -> jax.Array:
        return self.outputs["features"]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a strategy may know beside the rows.

    Attributes:
      predict: `(params, batch_stats, images) -> outputs`: the model as in evaluation, by running statistics.
      state: the strategy's own state, as its `init` or `end_task` left it; the same on every device.
      task: int32 scalar, the present task.
      classes: bool `[T, K]`, the classes that appear in each task.
      learning_rate: float32 scalar, of this step.
      key: for what the strategy draws in this step, the same on every device; None but in a step.
      tuning: whether the step is one of the fine-tuning on the memory alone that `config.finetune` asks for.
      vdot: the inner product of two trees like the `params` and gradients of `Gradients`, of which a device may have parts.
      inputs: `(params, batch_stats, images) -> {layer: float [b, D]}`: what enters each dense layer, as in evaluation.
    """

    predict: Callable[[PyTree, PyTree, jax.Array], Outputs]
    state: PyTree
    task: jax.Array
    classes: np.ndarray
    learning_rate: jax.Array
    key: jax.Array | None = None
    tuning: bool = False
    vdot: Callable[[PyTree, PyTree], jax.Array] = optax.tree.vdot
    inputs: Callable[[PyTree, PyTree, jax.Array], Outputs] | None = None

    @property
    def present(self) -> jax.Array:
        """bool `[K]`: the classes of this task."""
        return jnp.asarray(self.classes)[self.task]

    @property
    def seen(self) -> jax.Array:
        """bool `[K]`: the classes of this task and of those before it."""
        return jnp.asarray(np.logical_or.accumulate(self.classes))[self.task]

    @property
    def old(self) -> jax.Array:
        """bool `[K]`: the classes of earlier tasks; none in the first."""
        before = np.logical_or.accumulate(self.classes)
        return jnp.asarray(np.concatenate([np.zeros_like(before[:1]), before]))[self.task]


class Share(NamedTuple):
    """This device's share of a loss: the sum of `value` over the devices, divided by the sum of `weight` if there is one.

    The division is left to the step because the weight is then summed together with the gradients.
    """

    value: jax.Array
    weight: jax.Array | None = None

    def plus(self, term: jax.Array) -> "Share":
        """With a term added to the loss that every device knows whole."""
        return self._replace(value=self.value + (whole(term) if self.weight is None else term * self.weight))


def mean(values: jax.Array, valid: jax.Array) -> jax.Array:
    """This device's share of the mean of `values` `[b]` over the valid rows of all devices; 0 where there are none."""
    count = lax.psum(jnp.sum(valid, dtype=jnp.float32), AXIS)
    return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(count, 1.0)


def whole(value: jax.Array) -> jax.Array:
    """This device's share of a value that every device knows whole, such as a penalty on the parameters."""
    return value / lax.axis_size(AXIS)


def cross_entropy(part: Part) -> jax.Array:
    """Each row's cross-entropy `[b]` among the classes allowed, of logits + log prior where the prior is corrected; the mean of
    two where the model has logits of rows that saw each other, see `jaxcl/models/_batchformer.py`."""
    each = [part.outputs[name] for name in ("logits", "batch_logits") if name in part.outputs]
    if part.log_prior is not None:
        each = [logits + part.log_prior for logits in each]
    found = [losses.cross_entropy(logits, part.label, part.allowed) for logits in each]
    return found[0] if len(found) == 1 else (found[0] + found[1]) / 2


def row_loss(part: Part) -> jax.Array:
    """Each row's loss `[b]`: its reconstruction's error where there is something to reconstruct, else its cross-entropy."""
    return losses.reconstruction_error(part.outputs, part.target) if part.target else cross_entropy(part)


def pooled_mean(row_loss: Callable[[Part], jax.Array], parts: Sequence[Part]) -> Share:
    """The mean of `row_loss(part)` `[b]` over all valid rows, new and replayed alike but for their parts' weights."""
    value = [part.weight * jnp.sum(jnp.where(part.valid, row_loss(part), 0.0)) for part in parts]
    weight = [part.weight * jnp.sum(part.valid, dtype=jnp.float32) for part in parts]
    return Share(sum(value[1:], value[0]), sum(weight[1:], weight[0]))


def pooled(params: PyTree, parts: Sequence[Part], context: Context) -> Share:
    """Mean loss over all rows, new and replayed alike."""
    del params, context
    return pooled_mean(row_loss, parts)


class Descent(NamedTuple):
    """What a forward and backward pass over all devices' rows gives.

    Attributes:
      grads: like params; of the global loss, the same on every device.
      loss: float32 scalar, the global loss.
      batch_stats: the model's new running statistics.
      parts: this device's rows, with their outputs.
      noise: more metrics of the step, see `jaxcl.training.noise`; {} unless they are asked for.
    """

    grads: PyTree
    loss: jax.Array
    batch_stats: PyTree
    parts: tuple[Part, ...]
    noise: dict[str, jax.Array] = {}  # noqa: RUF012 -- never written to


Descend = Callable[[PyTree, PyTree, tuple[Part, ...]], Descent]


class Loss(Protocol):
    def __call__(self, params: PyTree, parts: Sequence[Part], context: Context) -> Share:
        """This device's share of the loss. `parts` are the new rows, then one part a draw, all with outputs."""


class Gradients(Protocol):
    def __call__(
        self, descend: Descend, params: PyTree, batch_stats: PyTree, parts: tuple[Part, ...], context: Context
    ) -> Descent:
        """Forms the gradients. `descend(params, batch_stats, parts)` is one pass with the strategy's loss. Of params and
        gradients a device may have parts alone, see `Strategy.by_parts`."""


class End(NamedTuple):
    """What is known when a task ends: a pass over rows has been made if the strategy has `visit`.

    Attributes:
      params, batch_stats: as the task left them.
      visited: the sum of `visit` over all rows, batches and devices; None without.
      context: its `state` is what the task began with.
    """

    params: PyTree
    batch_stats: PyTree
    visited: PyTree
    context: Context


def one_pass(
    descend: Descend, params: PyTree, batch_stats: PyTree, parts: tuple[Part, ...], context: Context
) -> Descent:
    """The gradients of one pass over all rows together."""
    del context
    return descend(params, batch_stats, parts)


def task_rows(scenario: Scenario, task: int) -> np.ndarray:
    """The rows of the task alone."""
    return scenario.tasks[task].train


def recent_classes(classes: np.ndarray, recent: int) -> np.ndarray:
    """bool `[T, K]`: of the classes of each task `[T, K]` those of a task and of the `recent` - 1 before it."""
    return np.stack([classes[max(0, end - recent) : end].any(0) for end in range(1, len(classes) + 1)])


def image_only(image: jax.Array, outputs: Outputs) -> PyTree:
    """The image as it arrived; label and id are stored beside every record."""
    del outputs
    return {"image": image}


class Strategy(NamedTuple):
    """A way of continual learning; `Strategy()` is plain training on what arrives.

    Attributes:
      rows: `(scenario, task) -> int64 [n]`, the rows of the train source a task trains on; none: nothing is trained.
      fresh: each task starts from newly initialised weights and optimiser.
      draws: independent draws from the rehearsal buffer a step replays; 0 for strategies without a buffer.
      selection: how the memory chooses, at a task's end, among all rows of the task, one of `SELECTIONS` unless the config
        says another; `buffer.policy` is then "herding". "": rows enter as they arrive, unless the config chooses.
      recent: of a memory filled at a task's end: the latest tasks whose classes it keeps. 0: those of all tasks.
      features: `(outputs, context) -> float32 [b, D]`, by which rows are chosen.
      record: `(image uint8 [b, H, W, C], outputs) -> pytree`, what the buffer stores of new rows, leaves `[b, ...]`,
        "image" among them. `outputs` are the model's in this step if it `stores_outputs`, else {}.
      stores_outputs: whether `record` reads `outputs`; an insert then has to wait for the forward pass.
      loss: see `Loss`.
      weights: of a loss that adds up a mean over each part, the weight of each part's cross-entropy in it; None where all rows
        are pooled, or only new ones classified.
      own_bias: how it treats the classifier's bias itself, where `config.loss.prior` would not do what it is meant to; "": it
        classifies by `cross_entropy`, which knows the prior.
      last_weights: how the end of a task ties evaluation to the weights that the last step left, where
        `config.optimizer.average` would judge others; "": it does not.
      head: whether it reads the kernel `[D, K]` of the linear head among the model's parameters.
      gradients: see `Gradients`.
      by_parts: whether `gradients` is right where a device has parts of `params`, and of what `descend` finds, alone, as it has
        with `mesh.fsdp`: it does with them what is done to each number by itself, gives them to `context.predict`, and
        multiplies trees by `context.vdot`. All else that a strategy is given is whole.
      begin: `(params) -> params`, what it makes of new or loaded weights before anything is trained. None: it takes them as
        they are.
      init: `(params, batch_stats) -> state`, the strategy's own state at the start of a run.
      visit: `(params, batch_stats, part, context) -> pytree`: what a pass over rows at the end of a task gathers from a
        batch on this device, the sum over its valid rows. `part.outputs` is empty, its images are not augmented.
      visits: whether that pass runs over the rows of the "task" or over those in the "buffer".
      end_task: `(End) -> (params, state)`, after a task.
      rounds: how often `visit` and `end_task` take turns after a task, each turn from what the last one left: iterations of
        a fit over all devices' rows.
      scores: `(outputs, state) -> [b, K]`, by which evaluation ranks the classes.
      alike: whether its loss treats rows of the memory like new ones, so that they may come among them (`buffer.replay`) or
        alone (`config.finetune`).
      frozen: `(params, context) -> pytree` like params of bools that broadcast to them: weights that a step leaves as they
        are. None: all are trained.
      learns: in which tasks the steps train: "all", the "first" alone, or "none"; in the others they change nothing, and what
        the strategy does is done at the task's end.
      rehearse: passes over the buffer which, at the end of a task, train newly initialised weights on it alone; the task
        itself then only fills the buffer. 0 for all that learn as they go.
      check: `(config)`, raises a UserError where the strategy's options do not go with the config of the run. None: all do.
      fit: `(layers) -> Strategy`, itself for a network whose trained parts are these dense layers, see
        `jaxcl.models.dense_layers`; raises a UserError where they are not what it needs. None: it need not know.
    """

    rows: Callable[[Scenario, int], np.ndarray] = task_rows
    fresh: bool = False
    draws: int = 0
    selection: str = ""
    recent: int = 0
    features: Callable[[Outputs, Context], jax.Array] = lambda outputs, context: outputs["features"]
    record: Callable[[jax.Array, Outputs], PyTree] = image_only
    stores_outputs: bool = False
    loss: Loss = pooled
    weights: tuple[Number, ...] | None = None
    own_bias: str = ""
    last_weights: str = ""
    head: bool = False
    gradients: Gradients = one_pass
    by_parts: bool = False
    begin: Callable[[PyTree], PyTree] | None = None
    init: Callable[[PyTree, PyTree], PyTree] = lambda params, batch_stats: {}
    visit: Callable[[PyTree, PyTree, Part, Context], PyTree] | None = None
    visits: str = "task"
    end_task: Callable[[End], tuple[PyTree, PyTree]] | None = None
    rounds: int = 1
    scores: Callable[[Outputs, PyTree], jax.Array] = lambda outputs, state: outputs["logits"]
    alike: bool = False
    frozen: Callable[[PyTree, Context], PyTree] | None = None
    learns: str = "all"
    rehearse: int = 0
    check: Callable[[ConfigDict], None] | None = None
    fit: Any = None

    @property
    def classifies(self) -> bool:
        """Whether it needs classes: all but plain training on rows, new and replayed, do."""
        return self.loss is not pooled or self.gradients is not one_pass or bool(self.end_task or self.rehearse)

    def stored(self, image: jax.Array, outputs: Outputs, target: dict[str, jax.Array]) -> PyTree:
        """The whole record of new rows: `record`, and what is to be reconstructed of them.

        Raises:
          UserError: `record` reads an output that there is not, above all without `stores_outputs`.
        """
        try:
            record = self.record(image, outputs)
        except KeyError as error:
            there = f"there are {', '.join(outputs)}" if outputs else "there are none: set stores_outputs=True"
            raise UserError(f"strategy: its record reads the model's output {error}; {there}") from error
        return record | ({"target": target} if target else {})
