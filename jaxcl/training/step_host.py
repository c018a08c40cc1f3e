"""The training step with the buffer in host memory: what it adds to that of the device tier.

Insert and draw are a program of their own, dispatched before the one that trains: what a program hands over can be read when
it has ended, and so the host stores and gathers while the devices train. A record that holds the model's outputs (DER) has to
wait for them; then the step is one program, as in the device tier.

A step begins by waiting for the rows that it replays, which the store gathered meanwhile.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.buffer import Shard, Staged
from jaxcl.buffer.host import Handover, Store
from jaxcl.mesh import ROWS, WHOLE, on_mesh
from jaxcl.strategies.base import Outputs
from jaxcl.training.given import Given, Program, make_given
from jaxcl.training.learn import Bound, Metrics, candidates, drawn_classes, learn, step_keys
from jaxcl.training.state import Clock, TrainState, specs
from jaxcl.types import Batch, PyTree

Phase = Callable[[str], contextlib.AbstractContextManager]
Handed = tuple[Handover, ...]  # one, or none where rows are handed over by callback
Told = tuple[Clock, jax.Array | None]  # and what `drawn_classes` says


def make_host_step(bound: Bound, seed: int) -> "HostStep":
    """The training step with a buffer in host memory."""
    assert bound.buffer is not None and bound.buffer.host is not None
    store, mesh, given = bound.buffer.host, bound.mesh, make_given(bound.mesh, seed, bound.numbers)
    state = specs(bound.layout, averaged=bound.average > 0)
    if bound.learn and bound.strategy.stores_outputs:
        step = functools.partial(train_and_turn, bound)
        program = on_mesh(mesh, step, (WHOLE, state, ROWS, ROWS), (state, WHOLE, ROWS), donate=1)
        return HostStep(store, Program(program, given))
    turn_ahead, train_behind = functools.partial(ahead, bound), functools.partial(train, bound)
    behind = on_mesh(mesh, train_behind, (WHOLE, state, WHOLE, ROWS, ROWS, ROWS), (state, WHOLE), donate=1)
    first = on_mesh(mesh, turn_ahead, (WHOLE, ROWS, WHOLE, ROWS), (ROWS, WHOLE, ROWS, ROWS), donate=1)
    return HostStep(store, Program(behind, given), Program(first, given))


# --- the programs, on a device's part of everything ------------------------------------------------------------------


def turn(
    bound: Bound, given: Given, shard: Shard, clock: Clock, batch: Batch, outputs: Outputs
) -> tuple[Shard, Staged, Handed]:
    """Insert, then draw; the rows are handed over to the host."""
    assert bound.buffer is not None
    _, insert_key, *draw_keys = step_keys(jax.random.wrap_key_data(given.key), clock.step, bound.strategy.draws)
    rows = candidates(bound, clock, batch, outputs)
    return bound.buffer.local.turn(shard, rows, insert_key, draw_keys, clock.step)


def train_on(
    bound: Bound, given: Given, state: TrainState, batch: Batch, arrived: jax.Array | None, drawn: jax.Array | None
) -> tuple[TrainState, Outputs, Metrics]:
    """`learn` on the new rows and on the draws, whose rows have `arrived` from the host: exchange, then training."""
    assert bound.buffer is not None
    staged = bound.buffer.local.receive(state.staged, arrived)
    augment_key = step_keys(jax.random.wrap_key_data(given.key), state.step, bound.strategy.draws)[0]
    state = dataclasses.replace(state, staged=staged)
    return learn(bound.rebind(bound, given.numbers), augment_key, state, batch, drawn)


def train_and_turn(
    bound: Bound, given: Given, state: TrainState, batch: Batch, arrived: jax.Array | None
) -> tuple[TrainState, Metrics, Handed]:
    """A whole step as one program."""
    assert state.buffer is not None
    after, outputs, metrics = train_on(bound, given, state, batch, arrived, drawn_classes(bound, state.buffer))
    shard, staged, handed = turn(bound, given, state.buffer, state.clock, batch, outputs)
    return dataclasses.replace(after, buffer=shard, staged=staged), metrics, handed


def ahead(bound: Bound, given: Given, shard: Shard, clock: Clock, batch: Batch) -> tuple[Shard, Told, Staged, Handed]:
    """The first of two programs. It hands the clock on, so that on every device the second one starts behind it."""
    told = clock, drawn_classes(bound, shard)
    shard, staged, handed = turn(bound, given, shard, clock, batch, {})
    return shard, told, staged, handed


def train(
    bound: Bound, given: Given, rest: TrainState, told: Told, staged: Staged, batch: Batch, arrived: jax.Array | None
) -> tuple[TrainState, Metrics]:
    """The second of two programs, which needs nothing of the first but what it is told; `rest`: see `rest_of`."""
    clock, drawn = told
    state = dataclasses.replace(rest, **clock._asdict(), staged=staged)
    after, _, metrics = train_on(bound, given, state, batch, arrived, drawn)
    return dataclasses.replace(after, staged=()), metrics


# --- on the host -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HostStep:
    """A training step of one program, or of two, whose store must be serving as it is prepared or lowered.

    Attributes:
      store: of the rows.
      program: jitted `(state, batch, arrived) -> (state, metrics, handed)`; of two the second, `(rest, told, staged, batch,
        arrived) -> (rest, metrics)` with `staged` of the step before. Donates the first argument.
      ahead: of two the first, jitted `(shard, clock, batch) -> (shard, told, staged, handed)`, donating the shard.
    """

    store: Store
    program: Any
    ahead: Any = None

    def prepare(self, state: PyTree, batch: PyTree, phase: Phase) -> "Fed":
        """See `DeviceStep`. Raises what the writer of the store has met with."""
        return Fed(self, state, batch, phase)

    def lower(self, state: PyTree, batch: PyTree) -> list[Any]:
        return [program.lower(*args) for program, args in self.calls(state, batch, self.store.take())]

    def calls(self, state: Any, batch: PyTree, arrived: jax.Array | None) -> list[tuple[Any, tuple[PyTree, ...]]]:
        """The programs with arguments of the shapes that they take."""
        if self.ahead is None:
            return [(self.program, (state, batch, arrived))]
        return [
            (self.ahead, (state.buffer, state.clock, batch)),
            (self.program, (rest_of(state), (state.clock, _classes_like(state)), state.staged, batch, arrived)),
        ]


class Fed:
    """A step of the host tier that is compiled: called like one of the device tier.

    It is compiled for as many rows as have arrived for its first step; for the other number (`Handover.wide`) when it comes.
    """

    def __init__(self, step: HostStep, state: PyTree, batch: PyTree, phase: Phase):
        self._step, self._phase = step, phase
        self._compiled: dict[Any, Any] = {}
        self._metrics: PyTree = None
        for program, args in step.calls(state, batch, step.store.take(self._finished)):
            self._made(program, *args)

    def __call__(self, state: Any, batch: PyTree) -> tuple[Any, PyTree]:
        step, store = self._step, self._step.store
        with self._phase("wait"):  # first: if the writer has failed, the state is still there to be saved
            arrived = store.take(self._finished)
        if step.ahead is None:
            with self._phase("train"):
                state, self._metrics, handed = self._run(step.program, state, batch, arrived)
            with self._phase("accumulate"):
                store.passed(handed)
            return state, self._metrics
        with self._phase("accumulate"):
            shard, told, drawn, handed = self._run(step.ahead, state.buffer, state.clock, batch)
            store.passed(handed)
        with self._phase("train"):
            rest, self._metrics = self._run(step.program, rest_of(state), told, state.staged, batch, arrived)
        return dataclasses.replace(rest, buffer=shard, staged=drawn), self._metrics

    def _run(self, program: Any, *args: PyTree) -> Any:
        return self._made(program, *args)(*args)

    def _made(self, program: Any, *args: PyTree) -> Any:
        """The program, compiled for these arguments."""
        arrived = args[-1].shape if isinstance(args[-1], jax.Array) else ()
        if (program, arrived) not in self._compiled:
            self._compiled[program, arrived] = program.lower(*args).compile()
        return self._compiled[program, arrived]

    def _finished(self) -> bool:
        """Whether the step before has ended."""
        if not all(x.is_ready() for x in jax.tree.leaves(self._metrics)):
            return False
        jax.block_until_ready(self._metrics)  # raises what the step itself met with
        return True


def _classes_like(state: TrainState) -> Any:
    """The shape of what `drawn_classes` gives."""
    x = state.arrived
    return None if x is None else jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)


def rest_of(state: TrainState) -> TrainState:
    """The state without buffer and draws."""
    return dataclasses.replace(state, buffer=None, staged=())
