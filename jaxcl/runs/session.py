"""One stretch of a run, from its start or resumption to its end: progress, log, checkpoints and what may interrupt it."""

import collections
import contextlib
import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxcl import mesh as mesh_lib
from jaxcl import signals
from jaxcl.buffer.host import Pending, Store
from jaxcl.errors import Diverged
from jaxcl.runs import checkpoint, control, workdir
from jaxcl.runs.code import Code, code_of
from jaxcl.runs.log import Log
from jaxcl.runs.writers import flat

T = TypeVar("T")
_log = logging.getLogger("jaxcl")


class State(Protocol):
    """What can be saved: a pytree of arrays with, among others, parameters."""

    @property
    def params(self) -> Any: ...


class Phases:
    """Wall seconds by phase of the loop; those of a phase within another count for the inner one alone."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float, seconds)
        self.now: str | None = None  # the innermost phase
        self._within = 0.0  # seconds of the phases that have ended within the present one

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin, before, self._within = time.perf_counter(), self._within, 0.0
        around, self.now = self.now, name
        try:
            yield
        finally:
            self.now = around
            whole = time.perf_counter() - begin
            self.seconds[name] += whole - self._within
            self._within = before + whole


@dataclasses.dataclass
class Progress:
    """How far a run has come, beside its TrainState; a checkpoint keeps it as JSON.

    Attributes:
      step: steps taken.
      task: the present task.
      rehearsing: whether the task's own batches are done, and those of its `Review` are on.
      iterator: state of the iterator over the present batches; None before the first of them.
      scores: by their name, a row of numbers for each task that is done.
      evaluations: whatever else was found, an entry for each evaluation that is done.
      counts: what the learner counts, by names of its own; for JSON.
      seconds, phases: wall seconds of the run, over all its sessions.
      log: see `Log.saved`.
      devices, processes: of the session that saved it.
      shards: parts that rows, and so the buffer, were split into; 0 of a save from before meshes had more axes: the devices.
      codes: what made it, see `jaxcl.runs.code`: more than one where it was continued by other code.
    """

    step: int = 0
    task: int = 0
    rehearsing: bool = False
    iterator: dict[str, Any] | None = None
    scores: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    counts: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    log: list[int] = dataclasses.field(default_factory=list)
    devices: int = 0
    processes: int = 1
    shards: int = 0
    codes: list[Code] = dataclasses.field(default_factory=list)

    def saved(self) -> dict[str, Any]:
        """A copy as JSON gives it back, from which `Progress(**...)` is made again."""
        return json.loads(json.dumps(vars(self)))

    @property
    def row_shards(self) -> int:
        """Parts of the buffer that was saved."""
        return self.shards or self.devices

    @property
    def name(self) -> str:
        """Of the checkpoint."""
        return checkpoint.name_of(self.task, self.rehearsing, self.batch)

    @property
    def batch(self) -> int:
        """The next of the present batches."""
        return self.iterator["next_index"] if self.iterator else 0


class Session:
    """Made by `open_session`.

    Attributes:
      folder: of the run.
      found: the manifest of the checkpoint to continue from, None for a new run.
      progress: kept up to date by the loop.
    """

    def __init__(
        self,
        config: ConfigDict,
        folder: pathlib.Path,
        mesh: jax.sharding.Mesh,
        found: dict[str, Any] | None,
        stack: contextlib.ExitStack,
        *,
        begin: float,
        start_seconds: float | None,
        stall_seconds: float | None,
        manifest: Mapping[str, Any],
    ):
        self.found, self.progress = found, Progress(**found["run"]) if found else Progress()
        self.phases = Phases(self.progress.phases)
        self._config, self.folder, self._mesh = config.checkpoint, folder, mesh
        self._begin = begin - self.progress.seconds
        self._saved = time.monotonic()
        self._finite = jax.jit(
            lambda params: jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]))
        )
        self._agreement = control.Agreement(mesh)
        self._preemption = stack.enter_context(signals.Preemption(lambda: self.phases.now == "save"))
        self._watchdog = control.Watchdog(start_seconds, stall_seconds)
        stack.callback(self._watchdog.close)
        code = code_of(config)
        if code not in self.progress.codes[-1:]:
            self.progress.codes.append(code)
        self.checkpoints = checkpoint.Checkpoints(
            folder / workdir.CHECKPOINTS, config.checkpoint.keep, workdir.resolved(config), {"code": code, **manifest}
        )
        stack.callback(self.checkpoints.close)
        step = self.progress.step if found else None
        self.log = Log(folder, jax.process_index() == 0, step, config.writers, flat(workdir.resolved(config)))
        stack.callback(self.log.close)
        self._stack, self._store = stack, None  # type: tuple[contextlib.ExitStack, Store | None]

    def serve(self, store: Store, step: int, staged: tuple[Pending, ...]) -> None:
        """Rows in host memory are served until the session ends, and saved with the state."""
        self._store = self._stack.enter_context(store.serving(step, staged))

    @property
    def writer_failed(self) -> bool:
        """Whether the writer of rows in host memory has; the rows handed over to it can still be stored."""
        return self._store is not None and self._store.failed

    def seconds(self) -> float:
        """Wall seconds of the run, over all its sessions; what a killed one did after its last checkpoint does not count."""
        return time.perf_counter() - self._begin

    def after_step(self, step: int, outputs: Any) -> int:
        """What all processes do now: control.GO_ON, SAVE or STOP.

        Raises:
          StorageError: a save in the background has failed.
        """
        self._preemption.unsaved = True
        self.checkpoints.check()
        due = self._config.every_seconds and time.monotonic() - self._saved >= self._config.every_seconds
        wish = control.STOP if self._preemption.asked else control.SAVE if due else control.GO_ON
        answer = self._agreement.at_step(wish, outputs)
        self._watchdog.done(f"step {step}")
        at_number = self._config.every_steps and step % self._config.every_steps == 0
        return max(answer, control.SAVE) if at_number else answer

    def strongest(self, number: int) -> int:
        """The largest of all processes; every one must call it alike."""
        return self._agreement.now(number)

    def watched(self, items: Iterable[T], what: str) -> Iterator[T]:
        """The items; each shows the watchdog that the run goes on."""
        for item in items:
            self._watchdog.done(what)
            yield item

    def save(self, state: State) -> None:
        """Starts a checkpoint of `state` and the present progress.

        Raises:
          Diverged: a parameter is not finite; such a state is never saved.
          StorageError: this save or the one before failed.
          What the writer of rows in host memory has met with, when the checkpoint is complete.
        """
        at, failure = self.progress, None
        with self.phases("save"):
            if not self._finite(state.params):
                raise Diverged(diverged("a parameter is not finite", at.step, at.task))
            at.seconds, at.phases = self.seconds(), dict(self.phases.seconds)
            at.log = self.log.saved()
            at.devices, at.processes = self._mesh.size, jax.process_count()
            at.shards = mesh_lib.row_shards(self._mesh)
            if self._store is not None:
                failure = self._store.settle()
            rows = {} if self._store is None else self._store.payload()
            self.checkpoints.save(at.name, state, at.saved(), rows)
            if failure is not None:
                self.checkpoints.wait()
                raise failure
        self._agreement.forget()
        self._saved = time.monotonic()
        self._watchdog.done(f"the save at step {at.step}")

    def stop_if_asked(self, answer: int | None = None) -> None:
        """To be called after a save: ends the run if any process was told to, as `after_step` has answered or as it is now.

        Raises:
          Preempted: it was told to.
        """
        if answer is None:
            answer = self._agreement.now(control.STOP if self._preemption.asked else control.GO_ON)
        if answer == control.STOP:
            with self.phases("save"):
                self.checkpoints.wait()
            raise self._preemption.stopped(f"saved at step {self.progress.step} in {self.folder}")


def open_session(
    stack: contextlib.ExitStack,
    config: ConfigDict,
    folder: pathlib.Path,
    mesh: jax.sharding.Mesh,
    *,
    begin: float,
    overwrite: bool = False,
    start_seconds: float | None = None,
    stall_seconds: float | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Session | dict[str, Any]:
    """Takes the folder for a run of the config, and finds out where it stands: its session, or the result of a finished one.

    Args:
      stack: at its end the session does, and the folder is given back.
      begin: `time.perf_counter()` at the beginning of the run.
      overwrite: remove what an earlier run left there.
      start_seconds, stall_seconds: how long to wait for the other processes, here and later, see `control.Watchdog`.
      manifest: what every checkpoint is to say beside what a session says, for JSON.

    Raises:
      UserError: the folder is in use, or see `workdir.claim`.
    """

    def claim() -> dict[str, Any]:
        result = None if overwrite else workdir.finished(folder, config)
        stands = workdir.Claim(result, None)
        if result is None:
            stack.enter_context(workdir.locked(folder))
            stands = workdir.claim(folder, config, overwrite)
        return {"config": workdir.resolved(config), **stands._asdict()}

    opened = mesh_lib.from_first(claim, start_seconds)
    workdir.check_same(opened["config"], config, "process 0 was started with another config")
    if opened["finished"] is not None:
        return opened["finished"]
    limits: Any = {"start_seconds": start_seconds, "stall_seconds": stall_seconds, "manifest": manifest or {}}
    session = Session(config, folder, mesh, opened["found"], stack, begin=begin, **limits)
    if session.found:
        at = session.progress
        _log.info(
            "%s: continued at step %d, task %d; saved by %d devices of %d processes, now %d of %d%s",
            *(folder, at.step, at.task, at.devices, at.processes, mesh.size, jax.process_count()),
            "" if at.row_shards == mesh_lib.row_shards(mesh) else ": the buffer is divided anew",
        )
        session.log.write("resume", at.step, {"devices": mesh.size, "processes": jax.process_count()})
    return session


def diverged(what: str, step: int, task: int) -> str:
    return f"{what} at step {step}, task {task}; checkpoints from before are kept; lower optimizer.learning_rate?"
