"""One training step, data-parallel: a single compiled program over all devices.

    batch (b rows a device) + staged (r rows a draw, drawn last step) -> augment -> gradients -> sum over devices -> optimiser
    batch -> insert into this device's shard -> draw r rows a device of the union -> staged for the next step

Nothing that the gradients need waits for the draw, so the compiler may overlap exchange and computation: step t replays
what was drawn from the buffer as it stood after the insert of step t - 1 (the asynchrony of Bouvier et al. 2024, exact
here). The buffer is written before it is read; the other order would copy it whole. A record may hold the model's outputs
for the new rows (DER): such an insert, and the draw behind it, then wait for the forward pass, not for the update.

With the buffer in host memory, the second line is a program of its own, dispatched before the first (unless the record holds
outputs): what a program hands over can be seen when it has ended, and so the host works while the devices train.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxcl import losses
from jaxcl.buffer import Buffer, Rows, Shard, Staged
from jaxcl.buffer import threefry as random
from jaxcl.buffer.host import InTwo
from jaxcl.mesh import AXIS
from jaxcl.models import Model
from jaxcl.strategies import Context, Descent, Part, Strategy
from jaxcl.strategies.base import Outputs
from jaxcl.training.state import TrainState, specs
from jaxcl.types import PyTree

Batch = dict[str, Any]
Augment = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Clock = tuple[jax.Array, jax.Array, jax.Array]  # step, task_step and steps_per_epoch of a `TrainState`


def _make_train_step(
    mesh: Mesh,
    model: Model,
    strategy: Strategy,
    buffer: Buffer | None,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    augment: Augment,
    seed: int | Sequence[int],
    classes: np.ndarray,
    *,
    loss_classes: str = "all",
    learn: bool = True,
    frozen: Sequence[str] = (),
    tuning: bool = False,
) -> Any:
    """Binds the parts of a run to `train_step(state, batch) -> (state, metrics)`, jitted and donating the state; with a
    buffer of the host tier to what `buffer.host.Fed` makes such a step of.

    `batch` is {"image": uint8 [B, H, W, C], "label": int32 [B], "id": int32 [B], "valid": bool [B]}, split by rows, and where
    images are to be reconstructed "target": {name: float32 [B, ...]}. Rows that are not valid weigh nothing.

    Args:
      seed: of augmentation and buffer. Several: the step takes one step for each of them, alone as before; every leaf of
        state, batch and metrics then has a leading axis of seeds (`vmap` within the `shard_map`). Device tier only.
      classes: bool `[T, K]`, the classes of each task.
      loss_classes: the classes among which rows are classified: "all" of the data set, those "seen" so far, or those of
        the "task" in which a row's class appears (one head a task).
      learn: False leaves the weights alone: a step then only fills the buffer and draws from it.
      frozen: names of the model's parts, as its parameters are named, whose weights and statistics stay as they are.
      tuning: what `Context.tuning` says.

    Metrics are scalars of this step: loss, accuracy (new rows), replay_accuracy (representatives; 0 without any),
    learning_rate, rows (valid new rows), replayed (valid representatives). Where images are to be reconstructed, error and
    replay_error instead of the accuracies.
    """
    same_task = np.any(classes[:, :, None] & classes[:, None, :], axis=0)  # [K, K]

    def with_classes(part: Part, context: Context) -> Part:
        if loss_classes == "all":
            return part
        allowed = context.seen[None, :] if loss_classes == "seen" else jnp.asarray(same_task)[part.label]
        return dataclasses.replace(part, allowed=jnp.broadcast_to(allowed, (len(part.label), classes.shape[1])))

    def make_parts(state: TrainState, batch: Batch, key: jax.Array, context: Context) -> tuple[Part, ...]:
        """The new rows, then those of each draw, augmented."""
        parts = [Part(batch["image"], batch["label"], batch["valid"], batch["id"], target=batch.get("target", {}))]
        parts += [
            Part(d.record["image"], d.label, d.valid, d.id, d.record, target=d.record.get("target", {}))
            for d in (state.staged if buffer is not None else ())
        ]
        sizes = [len(part.label) for part in parts]
        images = augment(key, _positions(sizes), jnp.concatenate([part.image for part in parts]))
        split = jnp.split(images, np.cumsum(sizes)[:-1])
        return tuple(
            with_classes(dataclasses.replace(part, image=image), context)
            for part, image in zip(parts, split, strict=True)
        )

    def make_descend(context: Context) -> Callable[[PyTree, PyTree, tuple[Part, ...]], Descent]:
        def descend(params: PyTree, batch_stats: PyTree, parts: tuple[Part, ...]) -> Descent:
            images, valid = (jnp.concatenate(x) for x in ([p.image for p in parts], [p.valid for p in parts]))
            borders = np.cumsum([len(part.label) for part in parts])[:-1]

            def objective(params):
                outputs, new_stats = model.apply(params, batch_stats, images, train=True, mask=valid)
                pieces = {name: jnp.split(x, borders) for name, x in outputs.items()}
                done = tuple(
                    dataclasses.replace(part, outputs={name: x[i] for name, x in pieces.items()})
                    for i, part in enumerate(parts)
                )
                share = strategy.loss(params, done, context)
                return share.value, (share.weight, new_stats, done)

            (value, (weight, new_stats, done)), grads = jax.value_and_grad(objective, has_aux=True)(params)
            grads, loss, weight = lax.psum((grads, value, weight), AXIS)
            if weight is not None:  # the exact mean, however the valid rows are spread over the devices
                total = jnp.maximum(weight, 1.0)
                grads, loss = jax.tree.map(lambda x: x / total, (grads, loss))
            return Descent(grads, loss, lax.pmean(new_stats, AXIS), done)

        return descend

    def still_weights(params: PyTree, context: Context) -> PyTree | None:
        """What a step leaves as it is: bools like the parameters, None for nothing."""
        if strategy.frozen is None and not frozen:
            return None
        none = jax.tree.map(lambda w: jnp.bool_(False), params)
        still = none if strategy.frozen is None else strategy.frozen(params, context)
        return still | {name: jax.tree.map(lambda w: jnp.bool_(True), params[name]) for name in frozen}

    def local_turn(
        key: jax.Array, shard: Shard, clock: Clock, batch: Batch, outputs: Outputs
    ) -> tuple[Shard, Staged, Any]:
        """The buffer's part of a step: insert, then draw."""
        assert buffer is not None
        step, task_step, steps_per_epoch = clock
        _, insert_key, *draw_keys = step_keys(key, step, strategy.draws)
        streams = not strategy.selection  # else rows enter at the task's end
        offered = batch["valid"] & streams & ((task_step < steps_per_epoch) | (buffer.repeats != "first_epoch"))
        record = strategy.stored(batch["image"], outputs, batch.get("target", {}))
        candidates = Rows(record, batch["label"], batch["id"], offered)
        return buffer.local.turn(shard, candidates, insert_key, draw_keys, step)

    def local_step(
        key: jax.Array, state: TrainState, batch: Batch, arrived: jax.Array | None = None
    ) -> tuple[PyTree, ...]:
        if buffer is not None:
            state = dataclasses.replace(state, staged=buffer.local.receive(state.staged, arrived))
        augment_key = step_keys(key, state.step, strategy.draws)[0]
        learning_rate = jnp.asarray(schedule(state.task_step / state.steps_per_epoch), jnp.float32)
        metrics = {"learning_rate": learning_rate}
        outputs: dict[str, jax.Array] = {}
        update: dict[str, PyTree] = {"step": state.step + 1, "task_step": state.task_step + 1}
        handover: Any = ()
        if learn:
            context = make_context(model, state.strategy_state, state.task, classes, learning_rate)
            own_key = jax.random.fold_in(augment_key, np.uint32(2**32 - 1))  # no row has this number
            context = dataclasses.replace(context, key=own_key, tuning=tuning)
            parts = make_parts(state, batch, augment_key, context)
            found = strategy.gradients(make_descend(context), state.params, state.batch_stats, parts, context)
            outputs = found.parts[0].outputs
            grads, still = found.grads, still_weights(state.params, context)
            if still is not None:
                grads = jax.tree.map(lambda f, g: jnp.where(f, 0.0, g), still, grads)
            direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = jax.tree.map(lambda p, d: p - learning_rate * d, state.params, direction)
            if still is not None:  # momentum and decay would move them
                params = jax.tree.map(jnp.where, still, state.params, params)
            kept = {name: x for name, x in state.batch_stats.items() if name in frozen}
            update |= {"params": params, "batch_stats": found.batch_stats | kept, "opt_state": opt_state}
            metrics |= {"loss": found.loss, **_scores(found.parts)}
        if buffer is not None and state.buffer is not None:
            stored, staged, handover = local_turn(key, state.buffer, _clock(state), batch, outputs)
            update |= {"buffer": stored, "staged": staged}
        return dataclasses.replace(state, **update), metrics, handover

    several = not isinstance(seed, int)
    spec, whole = specs(several), PartitionSpec()
    split = PartitionSpec(None, AXIS) if several else PartitionSpec(AXIS)

    def on_devices(function: Callable, in_specs: PyTree, out_specs: PyTree) -> Any:
        mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(mapped, donate_argnums=0)

    def run_key() -> jax.Array:
        return jax.random.key(seed) if isinstance(seed, int) else jnp.stack([jax.random.key(one) for one in seed])

    def one(*inputs: PyTree) -> tuple[PyTree, ...]:
        return local_step(run_key(), *inputs)

    if several:
        each = jax.vmap(lambda *args: local_step(*args)[:2])
        return on_devices(lambda *inputs: each(run_key(), *inputs), (spec, split), (spec, whole))
    if buffer is None or buffer.host is None:
        return on_devices(lambda *inputs: one(*inputs)[:2], (spec, split), (spec, whole))
    if learn and strategy.stores_outputs:
        return on_devices(one, (spec, split, split), (spec, whole, split))

    def ahead(shard: Shard, clock: Clock, batch: Batch) -> tuple[Shard, Clock, Staged, Any]:
        stored, staged, handover = local_turn(run_key(), shard, clock, batch, {})
        return stored, clock, staged, handover

    def train(
        state: TrainState, clock: Clock, staged: Staged, batch: Batch, arrived: jax.Array
    ) -> tuple[TrainState, PyTree]:
        step, task_step, steps_per_epoch = clock
        state = dataclasses.replace(
            state, step=step, task_step=task_step, steps_per_epoch=steps_per_epoch, staged=staged
        )
        state, metrics, _ = one(state, batch, arrived)
        return dataclasses.replace(state, staged=()), metrics

    return InTwo(
        ahead=on_devices(ahead, (split, whole, split), (split, whole, split, split)),
        train=on_devices(train, (spec, whole, split, split, split), (spec, whole)),
        apart=lambda state: (
            state.buffer,
            _clock(state),
            state.staged,
            dataclasses.replace(state, buffer=None, staged=()),
        ),
        together=lambda shard, staged, state: dataclasses.replace(state, buffer=shard, staged=staged),
    )


def _clock(state: TrainState) -> Clock:
    return state.step, state.task_step, state.steps_per_epoch


def step_keys(key: jax.Array, step: jax.Array, draws: int) -> jax.Array:
    """The keys of a step, `[2 + draws]`, of the run's: for its augmentation, its insert and each of its draws."""
    return random.split(random.fold_in(key, step), 2 + draws)


def make_context(
    model: Model, state: PyTree, task: jax.Array, classes: np.ndarray, learning_rate: jax.Array | float = 0.0
) -> Context:
    """What a strategy's functions are told beside the rows."""

    def predict(params: PyTree, batch_stats: PyTree, images: jax.Array) -> dict[str, jax.Array]:
        return model.apply(params, batch_stats, images, train=False)[0]

    return Context(predict, state, task, classes, jnp.asarray(learning_rate, jnp.float32))


def _scores(parts: Sequence[Part]) -> dict[str, jax.Array]:
    """Counts and mean scores of new and replayed rows over all devices."""
    name = "error" if parts[0].target else "accuracy"
    scored = [jnp.where(p.valid, _score(p), 0) for p in parts]
    counts = [[jnp.sum(x, dtype=jnp.float32) for x in (p.valid, s)] for p, s in zip(parts, scored, strict=True)]
    new, *replays = lax.psum(counts, AXIS)
    rows, score = new
    replayed, replay_score = (sum(x, jnp.float32(0)) for x in zip(*replays, strict=True)) if replays else (0.0, 0.0)
    return {
        name: score / jnp.maximum(rows, 1.0),
        f"replay_{name}": jnp.asarray(replay_score / jnp.maximum(replayed, 1.0)),
        "rows": rows,
        "replayed": jnp.asarray(replayed),
    }


def _score(part: Part) -> jax.Array:
    """Of each row: its reconstruction's error, or whether it is classified correctly."""
    if part.target:
        return losses.reconstruction_error(part.outputs, part.target)
    return losses.topk_correct(part.logits, part.label, class_mask=part.allowed)


def _positions(sizes: Sequence[int]) -> jax.Array:
    """Numbers of this device's rows in the global batch, part after part; they seed the rows' augmentation."""
    me, devices = lax.axis_index(AXIS), lax.axis_size(AXIS)
    begins = np.cumsum([0, *sizes[:-1]])
    parts = [devices * int(begin) + me * size + jnp.arange(size) for begin, size in zip(begins, sizes, strict=True)]
    return jnp.concatenate(parts).astype(jnp.int32)


class TrainStep:
    def __init__(self, program, buffer):
        self.program, self._buffer = program, buffer

    def prepare(self, state, batch, phase):
        from jaxcl.buffer.host import Fed

        store = None if self._buffer is None else self._buffer.host
        if store is None:
            return self.program.lower(state, batch).compile()
        fed = Fed(self.program, store, phase)
        fed.compile(state, batch)
        return fed


def make_train_step(mesh, model, strategy=None, buffer=None, *args, **options):
    return TrainStep(_make_train_step(mesh, model, strategy, buffer, *args, **options), buffer)
