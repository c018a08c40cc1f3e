"""Many steps as one program: a loop of the same step, over batches that are there, or whose rows are.

A small network takes less time for a step than the host for its dispatch. How many steps a call takes is an argument: one
program serves every number up to `most`, and how the steps of a run are divided into calls changes no bit of it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from jaxcl import data
from jaxcl.errors import UserError
from jaxcl.mesh import AXIS, WHOLE, on_mesh
from jaxcl.runs.feed import Feed, Streamed
from jaxcl.runs.lanes import Lanes
from jaxcl.training.given import Given, Program, make_given
from jaxcl.training.learn import Bound, Metrics
from jaxcl.training.sizes import bytes_of, check_on_devices, free_on_device
from jaxcl.training.state import TrainState, specs
from jaxcl.training.step import device_step
from jaxcl.types import Batch, PyTree

MOST = 128  # steps a call: by then a dispatch weighs nothing
HELD = 2**25  # bytes of a call's batches at most, where their rows are handed over
SHARE_ON_DEVICE = 1 / 16  # of what a device may hold: more than that of rows is not put there unasked


@dataclasses.dataclass(frozen=True)
class ManySteps:
    """Calls of many steps.

    Attributes:
      program: jitted `(state, batches, count) -> (state, metrics)`, donating the state; every metric has a leading axis of
        `most`, of which `count` are filled.
      most: steps a call.
      rows: of a task at most, that are kept on the devices; 0: batches are handed over with their rows.
    """

    program: Program
    most: int
    rows: int = 0

    def feed(self, lanes: Lanes[TrainState], loaders: Sequence[data.Loader]) -> Feed:
        """The batches of a task; its rows are put on the devices, if they are to be there."""
        return Resident(lanes, loaders, self.most, self.rows) if self.rows else Streamed(lanes, loaders, self.most)

    def prepare(self, state: TrainState, batches: PyTree) -> Any:
        """Compiles for these shapes."""
        return self.program.lower(state, batches, np.int32(0)).compile()


class Resident:
    """Batches as numbers of rows that are on the devices: those of all loaders, and one of padding behind them."""

    def __init__(self, lanes: Lanes[TrainState], loaders: Sequence[data.Loader], most: int, rows: int):
        self.most, self._lanes, self._loaders = most, lanes, loaders
        source, held = loaders[0].source, np.unique(np.concatenate([loader.order(0) for loader in loaders]))
        assert len(held) <= rows, "more rows than there is room for"
        self._place = np.full(len(source) + 1, rows, np.int32)  # that of padding, whose number is -1, behind them all
        self._place[held] = np.arange(len(held))
        table: Batch = {
            "image": source.read(held),
            "label": source.labels[held],
            "id": held.astype(np.int32),
            "valid": np.ones(len(held), bool),
        }
        if source.targets:
            table["target"] = {name: x[held] for name, x in source.targets.items()}
        padding = {"id": -1}

        def padded(path: Any, x: np.ndarray) -> np.ndarray:
            more = np.full((rows + 1 - len(x), *x.shape[1:]), padding.get(path[0].key, 0), x.dtype)
            return np.concatenate([x, more])

        self._table = lanes.whole(jax.tree_util.tree_map_with_path(padded, table))

    def __call__(self, index: int, count: int) -> tuple[PyTree, int]:
        steps = [
            [{"place": self._place[loader.rows(t)]} for loader in self._loaders] for t in range(index, index + count)
        ]
        return self._lanes.batches(steps, self.most) | {"table": self._table}, count


def choose_many_steps(
    config: ConfigDict, bound: Bound, seed: int | Sequence[int], train: data.Source, scenario: data.Scenario
) -> ManySteps | None:
    """Calls of many steps; None where a call takes one.

    Raises:
      UserError: the rows of a task are to be on the devices and cannot be.
    """
    row = {"image": np.zeros(train.image_shape, np.uint8), "target": {k: x[0] for k, x in train.targets.items()}}
    lanes = 1 if isinstance(seed, int) else len(seed)
    rows = _rows_on_device(config, bound, train, scenario, bytes_of(row))
    most = MOST if rows else min(MOST, HELD // max(lanes * config.batch_size * bytes_of(row), 1))
    most = config.steps_per_call or most
    if (bound.buffer is not None and bound.buffer.host is not None) or most <= 1:
        return None
    return make_many_steps(bound, seed, most, rows)


def _rows_on_device(
    config: ConfigDict, bound: Bound, train: data.Source, scenario: data.Scenario, row_bytes: int
) -> int:
    """Rows of the largest task, if the rows of a task are to be kept on every device; else 0."""
    asked, appended = config.data.on_device, config.buffer.replay != "draw"
    rows = max(len(bound.strategy.rows(scenario, task)) for task in range(len(scenario.tasks)))
    if asked == "auto":
        few = rows * row_bytes <= SHARE_ON_DEVICE * free_on_device(bound.mesh)
        return rows if few and train.in_memory and train.read_random is None and not appended else 0
    if asked == "never":
        return 0
    if train.read_random is not None or appended:
        what = "images are cut at random" if train.read_random is not None else "rows of the memory come among them"
        raise UserError(f"data.on_device: always is not allowed where {what}, give auto")
    check_on_devices({"data.on_device": ("always", rows * row_bytes)}, bound.mesh)
    return rows


def make_many_steps(bound: Bound, seed: int | Sequence[int], most: int, rows: int) -> ManySteps:
    """Calls of `most` steps of the device tier. Arguments as in `make_train_step`, and see `ManySteps`."""
    seeds = not isinstance(seed, int)
    state = specs(bound.layout, seeds=seeds, averaged=bound.average > 0)
    each = PartitionSpec(None, None, AXIS) if seeds else PartitionSpec(None, AXIS)
    batches: Any = {"place": each, "table": WHOLE} if rows else each
    given = make_given(bound.mesh, seed, bound.numbers)
    function = functools.partial(many_steps, bound, most)
    jitted = on_mesh(bound.mesh, function, (WHOLE, state, batches, WHOLE), (state, WHOLE), donate=1)
    return ManySteps(Program(jitted, given), most, rows)


def many_steps(
    bound: Bound, most: int, given: Given, state: TrainState, batches: PyTree, count: jax.Array
) -> tuple[TrainState, Metrics]:
    """`count` steps on this device's part of state and batches, and the metrics of each."""
    # Traced once, for the shapes of its metrics and for the loop.
    step = jax.jit(functools.partial(device_step, bound, given))
    shapes = jax.eval_shape(step, state, batch_of(batches, 0))[1]
    metrics = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), shapes)

    def body(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, metrics = carry
        state, found = step(state, batch_of(batches, i))
        return state, jax.tree.map(lambda all, one: lax.dynamic_update_index_in_dim(all, one, i, 0), metrics, found)

    return lax.fori_loop(0, count, body, (state, metrics))


def batch_of(batches: PyTree, i: jax.Array | int) -> Batch:
    """Batch `i` of a call."""
    if "table" not in batches:
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), batches)
    place = lax.dynamic_index_in_dim(batches["place"], i, keepdims=False)
    return jax.tree.map(lambda x: x.at[place].get(mode="promise_in_bounds"), batches["table"])
