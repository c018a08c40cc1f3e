"""Everything a run carries from step to step, as one pytree."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Buffer, Shard, Staged
from jaxcl.mesh import AXIS, ROWS, WHOLE
from jaxcl.models import Model
from jaxcl.partition import Layout
from jaxcl.strategies import Strategy
from jaxcl.training.average import Average
from jaxcl.types import PyTree

ROWS_OF_SEEDS = PartitionSpec(None, AXIS)  # as ROWS, behind a leading axis of seeds


class Clock(NamedTuple):
    """Where a step stands, as fields of `TrainState`: what its part of the buffer has to know."""

    step: jax.Array
    task_step: jax.Array
    steps_per_epoch: jax.Array


class Weights(NamedTuple):
    """What the model's outputs and the strategy's answers depend on, as fields of `TrainState`."""

    params: PyTree
    batch_stats: PyTree
    strategy_state: PyTree
    task: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of training; donated to every step. Weights, and what is like them, are whole on every device unless a
    `jaxcl.partition.Layout` divides them.

    Attributes:
      step: int32 scalar, steps taken since the run began.
      task_step: int32 scalar, steps taken since the task began.
      steps_per_epoch: int32 scalar of the present task, so that schedules run in epochs without a new trace a task.
      task: int32 scalar, the present task.
      params: the model's parameters, float32.
      batch_stats: the norm layers' running statistics, {} without any; whole on every device.
      opt_state: of the optimiser.
      buffer: the rehearsal buffer, split over the devices; None without rehearsal.
      staged: the draws made during the last step, which the next one replays; () without rehearsal.
      strategy_state: what the strategy keeps for itself, {} for most.
      arrived: int32 `[K]`, valid new rows of each class that the task has had; None unless the prior is corrected.
      average: of the weights, which evaluation then uses, see `jaxcl.training.average`; None without.
    """

    step: jax.Array
    task_step: jax.Array
    steps_per_epoch: jax.Array
    task: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    buffer: Shard | None
    staged: Staged
    strategy_state: PyTree
    arrived: jax.Array | None = None
    average: Average | None = None

    @property
    def clock(self) -> Clock:
        return Clock(self.step, self.task_step, self.steps_per_epoch)

    @property
    def weights(self) -> Weights:
        """As the last step left them."""
        return Weights(self.params, self.batch_stats, self.strategy_state, self.task)

    @property
    def evaluated(self) -> Weights:
        """Those by which test rows are judged: the average where there is one."""
        return self.weights if self.average is None else self.weights._replace(**self.average._asdict())


def specs(layout: Layout | None = None, *, seeds: bool = False, averaged: bool = False) -> TrainState:
    """How the state lies on the mesh, with or without a leading axis of seeds: a prefix of partition specs for `shard_map`.

    Args:
      layout: of the weights; None: whole on every device.
      averaged: whether an average of them is kept.
    """
    fields: dict[str, Any] = {field.name: WHOLE for field in dataclasses.fields(TrainState)}
    rows = ROWS_OF_SEEDS if seeds else ROWS
    fields |= {"buffer": rows, "staged": rows}
    if layout is not None:
        fields |= {name: getattr(layout, name) for name in ("params", "opt_state", "strategy_state")}
        fields["average"] = Average(layout.params, WHOLE) if averaged else WHOLE
    return TrainState(**fields)


def weights_specs(layout: Layout | None) -> Any:
    """The same of `Weights`."""
    fields: Any = {"batch_stats": WHOLE, "task": WHOLE}
    if layout is None:
        return WHOLE
    return Weights(params=layout.params, strategy_state=layout.strategy_state, **fields)


def make_weights(
    mesh: Mesh,
    model: Model,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    loaded: Mapping[str, np.ndarray] | None = None,
    layout: Layout | None = None,
    begin: Callable[[PyTree], PyTree] | None = None,
) -> Callable[[jax.Array], tuple[PyTree, PyTree, PyTree]]:
    """`new_weights(key) -> (params, batch_stats, opt_state)`: newly initialised but for those that were loaded, by their path,
    "params.head.kernel"; the same on any mesh. `begin`: see `Strategy`."""

    def make(loaded: Mapping[str, jax.Array], key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
        variables = model.init(key, image_shape)
        weights = {name: variables[name] for name in ("params", "batch_stats")}
        for path, x in loaded.items():
            *groups, leaf = path.split(".")
            group = weights
            for name in groups:
                group = group[name]
            group[leaf] = jnp.copy(x)  # the state is donated, what was loaded stays
        params = weights["params"] if begin is None else begin(weights["params"])
        return params, weights["batch_stats"], optimizer.init(params)

    laid = WHOLE if layout is None else (layout.params, WHOLE, layout.opt_state)
    out = mesh_lib.shardings(mesh, laid)
    given = dict(loaded or {})
    specs = {} if layout is None else {f"params.{path}": x for path, x in layout.by_path.items()}
    places = {name: NamedSharding(mesh, specs.get(name, WHOLE)) for name in given}
    made = jax.jit(make, out_shardings=out)

    def new_weights(key: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
        return made(jax.device_put(given, places), key)  # no device is handed more than its part

    return new_weights


def make_strategy_state(
    mesh: Mesh, strategy: Strategy, layout: Layout | None = None
) -> Callable[[PyTree, PyTree], PyTree]:
    """`(params, batch_stats) -> strategy_state` as a run begins with it; no array of it shares memory with another."""

    def make(*args: PyTree) -> PyTree:
        return jax.tree.map(jnp.copy, strategy.init(*args))

    out = WHOLE if layout is None else layout.strategy_state
    return jax.jit(make, out_shardings=mesh_lib.shardings(mesh, out))


def initial_state(
    mesh: Mesh,
    weights: tuple[PyTree, PyTree, PyTree],
    buffer: Buffer | None,
    strategy: Strategy,
    counted_classes: int | None = None,
    averaged: bool = False,
    layout: Layout | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      counted_classes: K where the new rows of each class are counted.
      averaged: whether an average of the weights is kept.
      layout: of the weights.
    """

    def number(value: int) -> jax.Array:  # donated leaf by leaf: no two may share a buffer
        return jnp.copy(mesh_lib.replicate(mesh, jnp.int32(value)))

    params, batch_stats, opt_state = weights
    return TrainState(
        step=number(0),
        task_step=number(0),
        steps_per_epoch=number(1),
        task=number(0),
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        buffer=None if buffer is None else buffer.init(),
        staged=() if buffer is None else tuple(buffer.no_rows() for _ in range(strategy.draws)),
        strategy_state=make_strategy_state(mesh, strategy, layout)(params, batch_stats),
        average=Average(*jax.tree.map(jnp.copy, (params, batch_stats))) if averaged else None,
        arrived=None if counted_classes is None else mesh_lib.replicate(mesh, np.zeros(counted_classes, np.int32)),
    )
