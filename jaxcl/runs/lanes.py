"""The seeds that one program trains side by side: one lane each, with its own config and session, at the same step.

The loop is written for lanes. `Lanes` is one seed alone, whose state is as the step takes it; `Together` several, whose states
are one with a leading axis of lanes, whole on every device, so that steps and evaluations are made as one by `vmap`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxcl import data
from jaxcl import mesh as mesh_lib
from jaxcl.mesh import AXIS
from jaxcl.runs.session import Progress, Session, State
from jaxcl.types import PyTree

S = TypeVar("S", bound=State)


class Lanes(Generic[S]):
    """One seed alone.

    Attributes:
      configs, sessions: of each lane.
      at: the progress of the first, which as to step, task and batch is that of all.
    """

    _rows_spec = PartitionSpec(AXIS)  # of a batch

    def __init__(self, mesh: Mesh, configs: Sequence[ConfigDict], sessions: Sequence[Session]):
        self.configs, self.sessions, self._mesh = configs, sessions, mesh

    def __len__(self) -> int:
        return len(self.configs)

    @property
    def at(self) -> Progress:
        return self.sessions[0].progress

    def stand(self, **progress: Any) -> None:
        """Sets these fields of every lane's progress."""
        for session in self.sessions:
            for name, value in progress.items():
                setattr(session.progress, name, value)

    @contextlib.contextmanager
    def phases(self, name: str) -> Iterator[None]:
        """The wall time within counts for this phase of every lane."""
        with contextlib.ExitStack() as stack:
            for session in self.sessions:
                stack.enter_context(session.phases(name))
            yield

    def save(self, state: S) -> None:
        """Starts a checkpoint of every lane."""
        for i, session in enumerate(self.sessions):
            session.save(self.one(state, i))

    def after_step(self, outputs: Any) -> int:
        """What all processes do now, see `Session.after_step`."""
        return max([session.after_step(self.at.step, outputs) for session in self.sessions])

    def stop_if_asked(self, answer: int | None = None) -> None:
        """Ends the runs, which have just been saved, if they were told to stop."""
        for session in self.sessions:
            session.stop_if_asked(answer)

    def join(self, states: Sequence[S]) -> S:
        """The state of all lanes from those of each."""
        return states[0]

    def one(self, state: S, lane: int) -> S:
        """The state of a lane from that of all."""
        return state

    def weights(self, each: Sequence[PyTree]) -> PyTree:
        """As `join`, of what every device holds whole."""
        return each[0]

    def batch(self, rows: Sequence[data.Batch]) -> PyTree:
        """Every lane's rows `[b, ...]` on the devices, split along b."""
        return self._put(self._side_by_side(rows), self._rows_spec)

    def batches(self, steps: Sequence[Sequence[data.Batch]], room: int) -> PyTree:
        """The rows of several steps, with a leading axis of `room` steps at least as many; the rest is 0."""

        def stacked(*each: np.ndarray) -> np.ndarray:
            found = np.zeros((room, *each[0].shape), each[0].dtype)
            np.stack(each, out=found[: len(each)])
            return found

        together = jax.tree.map(stacked, *map(self._side_by_side, steps))
        return self._put(together, PartitionSpec(None, *self._rows_spec))

    def whole(self, tree: PyTree) -> PyTree:
        """Host arrays, the same for all lanes and processes, whole on every device."""
        return mesh_lib.replicate(self._mesh, tree)

    def strongest(self, number: int) -> int:
        """The largest of all processes; every one must call it alike."""
        return self.sessions[0].strongest(number)

    def _put(self, local: PyTree, spec: PartitionSpec) -> PyTree:
        sharding = NamedSharding(self._mesh, spec)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)

    def _side_by_side(self, rows: Sequence[data.Batch]) -> PyTree:
        """The host arrays of every lane's batch as one pytree."""
        return rows[0]

    def number(self, x: int) -> jax.Array:
        """An int32 of the state, the same for all lanes."""
        return mesh_lib.replicate(self._mesh, np.int32(x))

    def each(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """A function of what belongs to one lane, made one of what belongs to all."""
        return function

    def split(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        """Results of a step or an evaluation, on the host, by lane."""
        return [found]


class Together(Lanes[S]):
    """Several seeds, in a process that is alone."""

    _rows_spec = PartitionSpec(None, AXIS)
    _join: Callable[..., S] | None = None  # compiled once, for the shardings of the first states

    def join(self, states: Sequence[S]) -> S:
        if self._join is None:
            alone = jax.tree.map(lambda x: x.sharding, states[0])
            all_lanes = jax.tree.map(lambda s: NamedSharding(self._mesh, PartitionSpec(None, *s.spec)), alone)
            self._join = jax.jit(_stack, out_shardings=all_lanes)
            self._one = jax.jit(lambda state, i: jax.tree.map(lambda x: x[i], state), out_shardings=alone)
        return self._join(*states)

    def one(self, state: S, lane: int) -> S:
        return self._one(state, lane)

    def weights(self, each: Sequence[PyTree]) -> PyTree:
        return jax.jit(_stack, out_shardings=mesh_lib.replicated(self._mesh))(*each)

    def _side_by_side(self, rows: Sequence[data.Batch]) -> PyTree:
        return jax.tree.map(lambda *x: np.stack(x), *rows)

    def number(self, x: int) -> jax.Array:
        return mesh_lib.replicate(self._mesh, np.full(len(self), x, np.int32))

    def each(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        return jax.vmap(function)

    def split(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        return [{name: x[i] for name, x in found.items()} for i in range(len(self))]


def _stack(*trees: PyTree) -> PyTree:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)
