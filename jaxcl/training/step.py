"""One training step, data-parallel: a single compiled program over all devices.

    batch (b rows a device) + staged (r rows a draw, drawn last step) -> augment -> gradients -> sum over devices -> optimiser
    batch -> insert into this device's shard -> draw r rows a device of the union -> exchange -> staged for the next step

Nothing that the gradients need waits for the draw, so the compiler may overlap exchange and computation: step t replays
what was drawn from the buffer as it stood after the insert of step t - 1 (the asynchrony of Bouvier et al. 2024, exact
here). The buffer is written before it is read; the other order would copy it whole. A record may hold the model's outputs
for the new rows (DER): such an insert, and the draw behind it, then wait for the forward pass, not for the update. With a
small network messages cost more than what they could overlap with: there the draw waits for the gradients, see `joins`.

The first line is `jaxcl.training.learn`. With the buffer in host memory the step is another, see `jaxcl.training.step_host`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from jaxcl.mesh import ROWS, WHOLE, on_mesh
from jaxcl.training.given import Given, Program, make_given
from jaxcl.training.learn import Bound, Metrics, candidates, drawn_classes, learn, step_keys
from jaxcl.training.sizes import bytes_of
from jaxcl.training.state import ROWS_OF_SEEDS, TrainState, specs
from jaxcl.training.step_host import HostStep, Phase, make_host_step
from jaxcl.types import Batch, PyTree

SMALL = 2**22  # bytes of gradients that take no longer to be summed than a message of a few bytes


def joins(params: PyTree) -> bool:
    """Whether the sizes of the shards are summed with the gradients, see `buffer.stage`: one message less, yet the draw waits
    for the gradients. With a large network it should not, since its exchange can go on beside the backward pass."""
    return bytes_of(params) <= SMALL


def train_step(bound: Bound, key: jax.Array, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """The step of the device tier, on this device's part of state and batch; `key` is the run's."""
    augment_key, insert_key, *draw_keys = step_keys(key, state.step, bound.strategy.draws)
    after, outputs, metrics = learn(bound, augment_key, state, batch, drawn_classes(bound, state.buffer))
    if bound.buffer is not None and state.buffer is not None:
        rows = candidates(bound, state.clock, batch, outputs)
        shard = bound.buffer.local.insert(state.buffer, rows, insert_key)
        staged = bound.buffer.local.stage(shard, draw_keys, joined=joins(state.params))  # and its exchange
        after = dataclasses.replace(after, buffer=shard, staged=staged)
    return after, metrics


def device_step(bound: Bound, given: Given, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """The same with what the run is given; of several seeds a step for each."""
    step = functools.partial(train_step, bound.rebind(bound, given.numbers))
    keys = jax.random.wrap_key_data(given.key)
    return step(keys, state, batch) if keys.ndim == 0 else jax.vmap(step)(keys, state, batch)


@dataclasses.dataclass(frozen=True)
class DeviceStep:
    """A training step of the device tier, not compiled yet.

    Attributes:
      program: jitted `(state, batch) -> (state, metrics)`, donating the state.
    """

    program: Any

    def prepare(self, state: TrainState, batch: Batch, phase: Phase) -> Any:
        """Compiles for these shapes: the step `(state, batch) -> (state, metrics)`, which donates the state and refuses other
        shapes.

        `phase(name)` is a context in which the caller's wall time counts for "wait", "accumulate" or "train"; the device tier
        does without.
        """
        del phase
        return self.lower(state, batch)[0].compile()

    def lower(self, state: TrainState, batch: Batch) -> list[Any]:
        """What `prepare` compiles."""
        return [self.program.lower(state, batch)]


TrainStep = DeviceStep | HostStep  # they have the same methods


def make_train_step(bound: Bound, seed: int | Sequence[int]) -> TrainStep:
    """A step `(state, batch) -> (state, metrics)`.

    `batch` is {"image": uint8 [B, H, W, C], "label": int32 [B], "id": int32 [B], "valid": bool [B]}, split by rows, and where
    images are to be reconstructed "target": {name: float32 `[B, ...]`}. Rows that are not valid weigh nothing.

    Args:
      seed: of augmentation and buffer. Several: the step takes one step for each of them, alone as before; every leaf of
        state, batch and metrics then has a leading axis of seeds (`vmap` within the `shard_map`). Device tier only.

    Metrics are scalars of this step: loss, accuracy (new rows), replay_accuracy (representatives; 0 without any),
    learning_rate, rows (valid new rows), replayed (valid representatives). Where images are to be reconstructed, error and
    replay_error instead of the accuracies.
    """
    if isinstance(seed, int) and bound.buffer is not None and bound.buffer.host is not None:
        return make_host_step(bound, seed)
    seeds = not isinstance(seed, int)
    state = specs(bound.layout, seeds=seeds, averaged=bound.average > 0)
    rows = ROWS_OF_SEEDS if seeds else ROWS
    function = functools.partial(device_step, bound)
    given = make_given(bound.mesh, seed, bound.numbers)
    return DeviceStep(Program(on_mesh(bound.mesh, function, (WHOLE, state, rows), (state, WHOLE), donate=1), given))
