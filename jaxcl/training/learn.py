"""What a step learns: new rows and representatives, augmented together, to gradients over all devices, to the optimiser."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from jaxcl import latent, losses
from jaxcl.buffer import Buffer, Rows, Shard, Staged
from jaxcl.buffer import threefry as random
from jaxcl.data.augment import Augment, Normalize
from jaxcl.latent import Latent, joined
from jaxcl.mesh import AXIS
from jaxcl.models import Model, RowFacts, dense_inputs
from jaxcl.partition import Layout
from jaxcl.strategies import Context, Descent, Part, Strategy
from jaxcl.strategies.base import Outputs
from jaxcl.training import noise, prior
from jaxcl.training.average import averaged
from jaxcl.training.given import Numbers
from jaxcl.training.latents import Codec
from jaxcl.training.microbatches import in_microbatches
from jaxcl.training.state import Clock, TrainState
from jaxcl.types import Batch, PyTree

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Bound:
    """What the programs of a run are bound to.

    Attributes:
      mesh: the devices.
      buffer: into which a step inserts and from which it draws; None without.
      optimizer: gradients to the direction of descent, before the learning rate is applied.
      schedule: the learning rate as a function of the epoch within a task.
      later_tasks: what every task but the first multiplies it by. Mirzadeh et al. 2020, Understanding the role of training
        regimes in continual learning: smaller steps leave more of what was learnt.
      augment: `(key, positions, images uint8) -> images float32`, see `jaxcl.data.make_augment`.
      normalize: `(images uint8) -> images float32`, as the model reads them where nothing is augmented.
      classes: bool `[T, K]`, the classes of each task.
      loss_classes: the classes among which rows are classified: "all" of the data set, those "seen" so far, or those of
        the "task" in which a row's class appears (one head a task).
      learn: False leaves the weights alone: a step then only fills the buffer and draws from it.
      frozen: names of the model's parts, as its parameters are named, whose weights and statistics stay as they are.
      scales: by which the learning rate of a part is multiplied; those that are not named have 1.
      tuning: see `Context.tuning`.
      prior: one of `prior.PRIORS`.
      replay_weight: of a replayed row in a mean over all rows, where a new one weighs 1.
      average: the decay of the average of the weights, where the state has one.
      batch_size: B, new rows of a step over all devices.
      noise: whether a step's metrics have the estimates of `jaxcl.training.noise`.
      task_of_row: int32 `[n]`, the task with which each row of the train source arrives; None where the model does not read
        `RowFacts`.
      layout: how weights lie on the mesh; None: whole on every device.
      codec: of the activations that the memory holds where new rows are images, see `jaxcl.training.latents`; None: it holds
        rows like the new ones.
      microbatches: in how many parts, one after the other, a device takes its rows through the model.
      numbers: of the config, which programs are given as arguments, see `Given`.
      rebind: `(bound, numbers) -> bound`: the same with these numbers, which may be traced.
    """

    mesh: Mesh
    model: Model
    strategy: Strategy
    buffer: Buffer | None
    optimizer: optax.GradientTransformation
    schedule: Callable[[jax.Array], jax.Array]
    augment: Augment
    normalize: Normalize
    classes: np.ndarray
    loss_classes: str = "all"
    learn: bool = True
    frozen: Sequence[str] = ()
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tuning: bool = False
    prior: str = "none"
    replay_weight: float = 1.0
    later_tasks: float = 1.0
    average: float = 0.0
    batch_size: int = 0
    noise: bool = False
    task_of_row: np.ndarray | None = None
    layout: Layout | None = None
    codec: Codec | None = None
    microbatches: int = 1
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rebind: Callable[["Bound", Numbers], "Bound"] = lambda bound, numbers: bound

    def recalled(self, image: jax.Array) -> jax.Array | Latent:
        """Rows as the memory holds them, uint8, as the model reads them where nothing is augmented."""
        return self.normalize(image) if self.codec is None else Latent(self.codec.plain(image))

    def predict(self, params: PyTree, batch_stats: PyTree, images: jax.Array) -> Outputs:
        """The model's outputs as in evaluation, by running statistics."""
        return self.model.apply(self.whole(params), batch_stats, images, train=False)[0]

    def inputs(self, params: PyTree, batch_stats: PyTree, images: jax.Array) -> Outputs:
        """What enters each dense layer, likewise."""
        return dense_inputs(self.model, self.whole(params), batch_stats, images)

    def whole(self, params: PyTree) -> PyTree:
        """The parameters, of which this device may have parts."""
        return params if self.layout is None else self.layout.whole(params)

    def whole_state(self, strategy_state: PyTree) -> PyTree:
        """The strategy's own state likewise."""
        return strategy_state if self.layout is None else self.layout.whole_state(strategy_state)

    def context(
        self, state: PyTree, task: jax.Array, learning_rate: jax.Array | float = 0.0, key: jax.Array | None = None
    ) -> Context:
        """What the strategy's functions are told beside the rows."""
        rate = jnp.asarray(learning_rate, jnp.float32)
        own = self.whole_state(state)
        context = Context(self.predict, own, task, self.classes, rate, key, self.tuning, inputs=self.inputs)
        return context if self.layout is None else dataclasses.replace(context, vdot=self.layout.vdot)


def learn(
    bound: Bound, key: jax.Array, state: TrainState, batch: Batch, drawn: jax.Array | None = None
) -> tuple[TrainState, Outputs, Metrics]:
    """Trains on this device's new rows and on the draws in `state.staged`; inside `shard_map`.

    Args:
      key: for the augmentation of this step, see `step_keys`.
      drawn: see `drawn_classes`.

    Returns:
      The state after the step but for the buffer and the draws; the model's outputs of the new rows, {} where nothing is
      learnt; the metrics, see `make_train_step`.
    """
    learning_rate = jnp.asarray(bound.schedule(state.task_step / state.steps_per_epoch), jnp.float32)
    if bound.later_tasks != 1:
        learning_rate *= jnp.where(state.task > 0, bound.later_tasks, 1.0)
    metrics = {"learning_rate": learning_rate}
    after = dataclasses.replace(state, step=state.step + 1, task_step=state.task_step + 1)
    if not bound.learn:
        return after, {}, metrics
    train = functools.partial(trained, bound, key, state, batch, drawn, after)
    if bound.strategy.learns == "first":
        after, found = in_first_task(state.task, after, lambda: train(learning_rate)[::2])
        return after, {}, metrics | found
    after, outputs, found = train(learning_rate)
    return after, outputs, metrics | found


def in_first_task(
    task: jax.Array, after: TrainState, train: Callable[[], tuple[TrainState, Metrics]]
) -> tuple[TrainState, Metrics]:
    """What `train` gives in the first task; later the state as it is, and metrics of 0."""
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(train)[1])
    return lax.cond(task == 0, train, lambda: (after, nothing))


def trained(
    bound: Bound,
    key: jax.Array,
    state: TrainState,
    batch: Batch,
    drawn: jax.Array | None,
    after: TrainState,
    learning_rate: jax.Array,
) -> tuple[TrainState, Outputs, Metrics]:
    """What `learn` does where something is learnt: `after`, the state but for what the gradients change, with that too."""
    own_key = jax.random.fold_in(key, np.uint32(2**32 - 1))  # no row has this number
    context = bound.context(state.strategy_state, state.task, learning_rate, own_key)

    parts: Sequence[Part] = parts_of(bound, batch, state.staged if bound.buffer is not None else (), context)
    if state.arrived is not None:  # the prior is corrected
        after = dataclasses.replace(after, arrived=prior.arrived_with(state.arrived, state.task_step, batch))
        parts = prior.with_shares(parts, after.arrived, drawn)
    one_pass = functools.partial(descend, bound, context)
    found = bound.strategy.gradients(one_pass, state.params, state.batch_stats, augmented(bound, key, parts), context)
    params, opt_state = optimise(bound, state, found.grads, context)

    kept = {name: x for name, x in state.batch_stats.items() if name in bound.frozen}
    batch_stats = found.batch_stats | kept
    after = dataclasses.replace(after, params=params, batch_stats=batch_stats, opt_state=opt_state)
    if state.average is not None:
        average = averaged(state.average, bound.average, state.task_step, params, batch_stats)
        after = dataclasses.replace(after, average=average)
    return after, found.parts[0].outputs, {"loss": found.loss, **found.noise, **scores(found.parts)}


def parts_of(bound: Bound, batch: Batch, draws: Staged, context: Context) -> list[Part]:
    """The new rows, then those of each draw; their images as they were stored."""
    new = Part(batch["image"], batch["label"], batch["valid"], batch["id"], target=batch.get("target", {}))
    drawn = [
        Part(d.record["image"], d.label, d.valid, d.id, d.record, target=d.record.get("target", {})) for d in draws
    ]
    weights = bound.strategy.weights or (1.0, *[bound.replay_weight] * len(drawn))
    return [
        dataclasses.replace(x, allowed=allowed_classes(bound, x.label, context), weight=weight)
        for x, weight in zip((new, *drawn), weights, strict=True)
    ]


def drawn_classes(bound: Bound, shard: Shard | None) -> jax.Array | None:
    """Rows of each class that each draw from this state of the buffer is expected to hold, `[K]`; None where nobody asks."""
    return (
        None if bound.prior == "none" or bound.buffer is None or shard is None else bound.buffer.local.expected(shard)
    )


def allowed_classes(bound: Bound, label: jax.Array, context: Context) -> jax.Array | None:
    """The classes among which rows `[b]` are classified, bool `[b, K]`; None for all."""
    if bound.loss_classes == "all":
        return None
    classes = bound.classes
    same_task = np.any(classes[:, :, None] & classes[:, None, :], axis=0)  # [K, K]
    allowed = context.seen[None, :] if bound.loss_classes == "seen" else jnp.asarray(same_task)[label]
    return jnp.broadcast_to(allowed, (len(label), classes.shape[1]))


def augmented(bound: Bound, key: jax.Array, parts: Sequence[Part]) -> tuple[Part, ...]:
    """All parts' images as the model reads them, concatenated and augmented together."""
    sizes = [len(part.label) for part in parts]
    if bound.codec is not None:  # rows of the memory enter above all augmentation
        new, *drawn = parts
        image = bound.augment(key, positions(sizes[:1]), new.image)
        return dataclasses.replace(new, image=image), *(
            dataclasses.replace(part, image=bound.recalled(part.image)) for part in drawn
        )
    images = bound.augment(key, positions(sizes), jnp.concatenate([part.image for part in parts]))
    split = jnp.split(images, np.cumsum(sizes)[:-1])
    return tuple(dataclasses.replace(part, image=image) for part, image in zip(parts, split, strict=True))


def positions(sizes: Sequence[int]) -> jax.Array:
    """Numbers of this device's rows in the global batch, part after part; they seed the rows' augmentation."""
    me, devices = lax.axis_index(AXIS), lax.axis_size(AXIS)
    begins = np.cumsum([0, *sizes[:-1]])
    parts = [devices * int(begin) + me * size + jnp.arange(size) for begin, size in zip(begins, sizes, strict=True)]
    return jnp.concatenate(parts).astype(jnp.int32)


def descend(bound: Bound, context: Context, params: PyTree, batch_stats: PyTree, parts: tuple[Part, ...]) -> Descent:
    """A forward and a backward pass over the rows of all devices."""
    images, valid = joined([part.image for part in parts]), jnp.concatenate([part.valid for part in parts])
    mask = row_facts(bound, parts, context) if bound.model.reads else valid
    parts = prior.with_priors(parts, pooled=bound.strategy.weights is None)
    borders = np.cumsum([len(part.label) for part in parts])[:-1]

    # What is frozen has no gradient: nothing is computed for it, and nothing of it travels but what fsdp divides.
    still = {name: x for name, x in params.items() if name in bound.frozen}
    trained = {name: x for name, x in params.items() if name not in bound.frozen}

    def forward(trained: PyTree, images: latent.Rows, mask: jax.Array | RowFacts) -> tuple[Outputs, PyTree]:
        return bound.model.apply(bound.whole(still | trained), batch_stats, images, train=True, mask=mask)

    def judge(trained: PyTree, outputs: Outputs) -> tuple[jax.Array, tuple]:
        outputs = dict(outputs)
        penalty = outputs.pop("penalty", None)
        pieces = {name: jnp.split(x, borders) for name, x in outputs.items()}
        done = tuple(
            dataclasses.replace(part, outputs={name: x[i] for name, x in pieces.items()})
            for i, part in enumerate(parts)
        )
        share = bound.strategy.loss(bound.whole(still | trained), done, context)
        if penalty is not None:
            share = share.plus(mean_of_rows(penalty, valid) if penalty.ndim else penalty)
        return share.value, (share.weight, done)

    if bound.microbatches > 1:
        assert isinstance(images, jax.Array), "activations of some rows do not go with microbatches"
        value, (weight, done), grads = in_microbatches(
            bound.microbatches, by_layout(bound, forward), judge, trained, images, mask
        )
        new_stats = batch_stats
    else:

        def objective(trained: PyTree) -> tuple[jax.Array, tuple]:
            outputs, new_stats = forward(trained, images, mask)
            value, (weight, done) = judge(trained, outputs)
            return value, (weight, new_stats, done)

        descent = jax.value_and_grad(by_layout(bound, objective), has_aux=True)(trained)
        (value, (weight, new_stats, done)), grads = descent
    mine = (noise.square_of(grads), jnp.sum(valid, dtype=jnp.float32)) if bound.noise else None
    if bound.layout is None:
        grads, loss, weight, mine = lax.psum((grads, value, weight, mine), AXIS)
    else:
        grads, loss, weight, mine = bound.layout.summed(grads, value, weight, mine)
    total = None
    if weight is not None:  # the exact mean, however the valid rows are spread over the devices
        total = jnp.maximum(weight, 1.0)
        grads, loss = jax.tree.map(lambda x: x / total, (grads, loss))
    found = {} if mine is None else noise.estimates(grads, mine[0] if total is None else mine[0] / total**2, mine[1])
    grads |= jax.tree.map(jnp.zeros_like, still)
    return Descent(grads, loss, lax.pmean(new_stats, AXIS), done, found)


def mean_of_rows(values: jax.Array, valid: jax.Array) -> jax.Array:
    """The mean of `values` `[b]` over the valid rows of all devices, which every device then knows; 0 where there are none."""
    counts = jnp.where(valid, values, 0.0).sum(), jnp.sum(valid, dtype=jnp.float32)
    total, count = lax.psum(counts, AXIS)
    return total / jnp.maximum(count, 1.0)


def row_facts(bound: Bound, parts: Sequence[Part], context: Context) -> RowFacts:
    """What the model is told of this device's rows, part after part."""
    assert bound.task_of_row is not None
    me, devices = lax.axis_index(AXIS), lax.axis_size(AXIS)
    sizes = [len(part.label) for part in parts]
    replayed = [part.record is not None for part in parts]
    return RowFacts(
        valid=jnp.concatenate([part.valid for part in parts]),
        task=jnp.asarray(bound.task_of_row).at[jnp.concatenate([part.id for part in parts])].get(mode="clip"),
        replayed=jnp.asarray(np.repeat(replayed, sizes)),
        place=jnp.concatenate([me * size + jnp.arange(size, dtype=jnp.int32) for size in sizes]),
        of=jnp.asarray(np.repeat([devices * size for size in sizes], sizes).astype(np.int32)),
        now=context.task,
        batch_size=bound.batch_size,
    )


def by_layout(bound: Bound, function: Callable) -> Callable:
    """`function(params, ...)`, which keeps no more of the weights for its backward pass than the layout lets it."""
    return function if bound.layout is None else bound.layout.checkpointed(function)


def optimise(bound: Bound, state: TrainState, grads: PyTree, context: Context) -> tuple[PyTree, PyTree]:
    """The new parameters and the optimiser's new state."""
    still = still_weights(bound, state.params, context)
    if still is not None:
        grads = jax.tree.map(lambda f, g: jnp.where(f, 0.0, g), still, grads)
    params = state.params
    if bound.layout is not None:
        grads, params = bound.layout.own(grads), bound.layout.own(params)
    direction, opt_state = bound.optimizer.update(grads, state.opt_state, params)
    if bound.scales:
        scaled = {
            part: jax.tree.map(functools.partial(jnp.multiply, x), direction[part]) for part, x in bound.scales.items()
        }
        direction |= scaled
    params = jax.tree.map(lambda p, d: p - context.learning_rate * d, params, direction)
    if bound.layout is not None:
        params = bound.layout.joined(params)
    if still is not None:  # momentum and decay would move them
        params = jax.tree.map(jnp.where, still, state.params, params)
    return params, opt_state


def still_weights(bound: Bound, params: PyTree, context: Context) -> PyTree | None:
    """What a step leaves as it is: bools like the parameters, None for nothing."""
    if bound.strategy.frozen is None and not bound.frozen:
        return None
    none = jax.tree.map(lambda w: jnp.bool_(False), params)
    still = none if bound.strategy.frozen is None else bound.strategy.frozen(bound.whole(params), context)
    still = still | {name: jax.tree.map(lambda w: jnp.bool_(True), params[name]) for name in bound.frozen}
    return still if bound.layout is None else bound.layout.parts(still)


def candidates(bound: Bound, clock: Clock, batch: Batch, outputs: Outputs) -> Rows:
    """What a step offers to the buffer: the new rows as they arrived, with what the strategy stores of the outputs."""
    assert bound.buffer is not None
    streams = not bound.strategy.selection  # else rows enter at the task's end
    first_epoch = clock.task_step < clock.steps_per_epoch
    offered = batch["valid"] & streams & (first_epoch | (bound.buffer.repeats != "first_epoch"))
    record = bound.strategy.stored(batch["image"], outputs, batch.get("target", {}))
    return Rows(record, batch["label"], batch["id"], offered)


def step_keys(key: jax.Array, step: jax.Array, draws: int) -> jax.Array:
    """The keys of a step, `[2 + draws]`, of the run's: for its augmentation, its insert and each of its draws."""
    return random.split(random.fold_in(key, step), 2 + draws)


def scores(parts: Sequence[Part]) -> Metrics:
    """Counts and mean scores of new and replayed rows over all devices."""
    name = "error" if parts[0].target else "accuracy"
    scored = [jnp.where(part.valid, score(part), 0) for part in parts]
    counts = [[jnp.sum(x, dtype=jnp.float32) for x in (p.valid, s)] for p, s in zip(parts, scored, strict=True)]
    new, *replays = lax.psum(counts, AXIS)
    rows, new_score = new
    replayed, replay_score = (sum(x, jnp.float32(0)) for x in zip(*replays, strict=True)) if replays else (0.0, 0.0)
    return {
        name: new_score / jnp.maximum(rows, 1.0),
        f"replay_{name}": jnp.asarray(replay_score / jnp.maximum(replayed, 1.0)),
        "rows": rows,
        "replayed": jnp.asarray(replayed),
    }


def score(part: Part) -> jax.Array:
    """Of each row `[b]`: its reconstruction's error, or whether it is classified correctly."""
    if part.target:
        return losses.reconstruction_error(part.outputs, part.target)
    return losses.topk_correct(part.logits, part.label, class_mask=part.allowed)
