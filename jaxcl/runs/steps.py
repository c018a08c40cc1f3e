"""The steps of a run: a batch in, a step, a line in the log, and a save or a stop where one is asked for."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxcl.data.loader import Reading
from jaxcl.errors import DataError, Diverged
from jaxcl.runs import control
from jaxcl.runs.lanes import Lanes, S
from jaxcl.runs.progress import Bar
from jaxcl.runs.session import diverged
from jaxcl.types import PyTree

STEPPING = ("load", "assemble", "wait", "train", "accumulate")  # phases of a step; wait and accumulate: the host tier's
Step = Callable[[Any, PyTree], tuple[Any, dict[str, jax.Array]]]


def reading(threads: int, workers: int = 0) -> Reading:
    """How this process reads its slice of every global batch: arguments of the functions in `jaxcl.data.loader`."""
    return {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "num_threads": threads,
        "num_workers": workers,
    }


def take_steps(lanes: Lanes[S], step: Step, state: S, loaders: Sequence[Any], bar: Bar) -> S:
    """Takes the steps over these batches, one loader a lane, that are not taken yet.

    Returns:
      The state after the last one, finished on the devices.

    Raises:
      Diverged: a loss is not finite.
      DataError: a row cannot be read; the run is saved.
      Preempted: the run was told to stop, and is saved.
    """
    at, phases, steps = lanes.at, lanes.phases, len(loaders[0])
    log = _LateLog(lanes, loaders[0].steps_per_epoch)
    iterators = [iter(loader) for loader in loaders]
    for iterator, session in zip(iterators, lanes.sessions, strict=True):
        if session.progress.iterator is not None:
            iterator.set_state(session.progress.iterator)
    saved = at.batch

    def keep(index: int) -> None:
        """Saves the state before batch `index` as an error ends the run; of several processes the others have gone on."""
        if jax.process_count() == 1:
            log.flush()
            lanes.stand(iterator={"next_index": index})
            lanes.save(state)

    for index in range(at.batch, steps):
        with phases("load"):
            try:
                rows = [next(iterator) for iterator in iterators]
            except DataError:
                if index > saved:
                    keep(index)
                raise
        with phases("assemble"):
            batch = lanes.batch(rows)
        with phases("train"):
            try:
                state, values = step(state, batch)
            except Exception:
                if lanes.sessions[0].writer_failed:
                    keep(index)  # raises what the writer has met with
                raise
            lanes.stand(step=at.step + 1)
            if index % lanes.configs[0].log_every == 0 or index == steps - 1:
                log.put(index, values)
            answer = lanes.after_step(values)
        bar.update()
        if answer != control.GO_ON and index + 1 < steps:  # behind the last step the caller saves
            with phases("train"):
                log.flush()
            for iterator, session in zip(iterators, lanes.sessions, strict=True):
                session.progress.iterator = iterator.get_state()
            lanes.save(state)
            saved = index + 1
            lanes.stop_if_asked(answer)
    with phases("train"):
        log.flush()
        jax.block_until_ready(state)
    return state


class _LateLog:
    """Writes the metrics of a step when those of the next one to be logged come, so that the devices never wait for it."""

    def __init__(self, lanes: Lanes, steps_per_epoch: int):
        self._lanes, self._steps_per_epoch = lanes, steps_per_epoch
        self._waiting: list[tuple[int, float, PyTree]] = []  # at most one: step, epoch, metrics

    def put(self, index: int, values: PyTree) -> None:
        """The metrics of the step just taken, batch `index` of the present ones."""
        self.flush()
        self._waiting.append((self._lanes.at.step, index / self._steps_per_epoch, values))

    def flush(self) -> None:
        """Raises:
        Diverged: a loss is not finite.
        """
        while self._waiting:
            step, epoch, values = self._waiting.pop()
            task = self._lanes.at.task
            found = self._lanes.split(jax.device_get(values))
            each = [{name: float(x) for name, x in mine.items()} for mine in found]
            for session, mine in zip(self._lanes.sessions, each, strict=True):
                session.log.write("train", step, {"task": task, "epoch": epoch, **mine})
            losses = [mine.get("loss", 0.0) for mine in each]
            if not np.isfinite(losses).all():
                what = f"the loss is {losses[0]}" if len(losses) == 1 else f"the loss of the seeds is {losses}"
                raise Diverged(diverged(what, step, task))
