"""One training step, data-parallel: a single compiled program over all devices.

    batch (b rows a device) + staged (r rows, drawn last step) -> augment -> gradients -> sum over devices -> optimiser
    batch -> insert into this device's shard -> draw r rows a device of the union -> staged for the next step

Nothing that the gradients need waits for the draw, so the compiler may overlap exchange and computation: step t replays
what was drawn from the buffer as it stood after the insert of step t - 1 (the asynchrony of Bouvier et al. 2024, exact
here). The buffer is written before it is read; the other order would copy it whole.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxcl import losses
from jaxcl.buffer import Buffer, Rows
from jaxcl.mesh import AXIS
from jaxcl.models import Model
from jaxcl.strategies import Strategy
from jaxcl.training.state import TrainState, specs

PyTree = Any
Batch = dict[str, jax.Array]
Augment = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def make_train_step(
    mesh: Mesh,
    model: Model,
    strategy: Strategy,
    buffer: Buffer | None,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    augment: Augment,
    seed: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Binds the parts of a run to `train_step(state, batch) -> (state, metrics)`, jitted and donating the state.

    `batch` is {"image": uint8 [B, H, W, C], "label": int32 [B], "id": int32 [B], "valid": bool [B]}, split by rows. Rows
    that are not valid weigh nothing. The loss is the mean over all valid rows, new and replayed, of all devices.

    Metrics are scalars of this step: loss, accuracy (new rows), replay_accuracy (representatives; 0 without any),
    learning_rate, rows (valid new rows), replayed (valid representatives).
    """

    def loss_sum(params: PyTree, batch_stats: PyTree, images: jax.Array, label: jax.Array, valid: jax.Array) -> Any:
        outputs, batch_stats = model.apply(params, batch_stats, images, train=True, mask=valid)
        row_loss = losses.cross_entropy(outputs["logits"], label)
        correct = losses.topk_correct(outputs["logits"], label) & valid
        return jnp.sum(jnp.where(valid, row_loss, 0.0)), (batch_stats, correct)

    def local_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        augment_key, insert_key, draw_key = jax.random.split(key, 3)
        new = batch["label"].shape[0]
        images, label, valid = batch["image"], batch["label"], batch["valid"]
        if state.staged is not None:
            staged = state.staged
            images = jnp.concatenate([images, staged.record["image"]])
            label = jnp.concatenate([label, staged.label])
            valid = jnp.concatenate([valid, staged.valid])
        images = augment(augment_key, _positions(new, label.shape[0] - new), images)

        gradient = jax.value_and_grad(loss_sum, has_aux=True)
        (loss, (batch_stats, correct)), grads = gradient(state.params, state.batch_stats, images, label, valid)
        counts = [jnp.sum(x, dtype=jnp.float32) for x in (valid[:new], valid[new:], correct[:new], correct[new:])]
        # The sum of the devices' sums over the count of all valid rows: the exact mean, however rows are spread.
        grads, loss, (rows, replayed, right, replay_right) = lax.psum((grads, loss, counts), AXIS)
        total = jnp.maximum(rows + replayed, 1.0)
        grads = jax.tree.map(lambda g: g / total, grads)
        batch_stats = lax.pmean(batch_stats, AXIS)

        learning_rate = schedule(state.task_step / state.steps_per_epoch)
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: p - learning_rate * d, state.params, direction)

        state = dataclasses.replace(
            state,
            step=state.step + 1,
            task_step=state.task_step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        if buffer is not None and strategy.record is not None and state.buffer is not None:
            candidates = Rows(strategy.record(batch), batch["label"], batch["id"], batch["valid"])
            stored = buffer.local.insert(state.buffer, candidates, insert_key)
            state = dataclasses.replace(state, buffer=stored, staged=buffer.local.draw(stored, draw_key))
        metrics = {
            "loss": loss / total,
            "accuracy": right / jnp.maximum(rows, 1.0),
            "replay_accuracy": replay_right / jnp.maximum(replayed, 1.0),
            "learning_rate": jnp.asarray(learning_rate, jnp.float32),
            "rows": rows,
            "replayed": replayed,
        }
        return state, metrics

    spec = specs()
    split = PartitionSpec(AXIS)
    mapped = jax.shard_map(
        local_step, mesh=mesh, in_specs=(spec, split), out_specs=(spec, PartitionSpec()), check_vma=False
    )
    return jax.jit(mapped, donate_argnums=0)


def _positions(new: int, replayed: int) -> jax.Array:
    """Numbers of this device's rows in the global augmented batch, new rows first; they seed the rows' augmentation."""
    me, devices = lax.axis_index(AXIS), lax.axis_size(AXIS)
    return jnp.concatenate([me * new + jnp.arange(new), devices * new + me * replayed + jnp.arange(replayed)]).astype(
        jnp.int32
    )
