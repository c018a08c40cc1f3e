"""The steps of a run: batches in, a call of one step or of many, lines in the log, a save or a stop where one is asked for.

While a call is under way the next batches are handed over in a thread, and the call behind it is dispatched; never more than
two are. A call ends where a save by number is due; what else is asked for is answered at its end.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxcl.data.loader import Reading
from jaxcl.errors import DataError, Diverged
from jaxcl.runs import control
from jaxcl.runs.feed import Feed, Streamed
from jaxcl.runs.lanes import Lanes, S
from jaxcl.runs.progress import Bar
from jaxcl.runs.session import diverged
from jaxcl.types import PyTree

STEPPING = ("load", "assemble", "wait", "train", "accumulate")  # phases of a step; wait and accumulate: the host tier's
CALL_SECONDS = 0.2  # of a call, where the config does not say of how many steps: a stop waits for two
# `(state, batch) -> (state, metrics)`; of many steps `(state, batches, count) -> (state, metrics)`, each with a leading axis
Step = Callable[..., tuple[Any, dict[str, jax.Array]]]


def reading(threads: int, workers: int = 0) -> Reading:
    """How this process reads its slice of every global batch: arguments of the functions in `jaxcl.data.loader`."""
    return {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "num_threads": threads,
        "num_workers": workers,
    }


def take_steps(
    lanes: Lanes[S],
    step: Step,
    state: S,
    loaders: Sequence[Any],
    bar: Bar,
    feed: Feed | None = None,
    steps_per_call: int = 0,
) -> S:
    """Takes the steps over these batches, one loader a lane, that are not taken yet.

    Args:
      feed: how the batches reach the devices, and how many steps a call of `step` takes; None: one by one, as they are read.
      steps_per_call: as the config says it; 0: as many as take `CALL_SECONDS`.

    Returns:
      The state after the last one, finished on the devices.

    Raises:
      Diverged: a loss is not finite.
      DataError: a row cannot be read; the run is saved.
      Preempted: the run was told to stop, and is saved.
    """
    at, phases, steps = lanes.at, lanes.phases, len(loaders[0])
    log, feed = _LateLog(lanes, loaders[0].steps_per_epoch), feed or Streamed(lanes, loaders)
    pace = _Pace(lanes, feed.most, steps_per_call)
    index = saved = at.batch

    def keep(index: int) -> None:
        """Saves the state before batch `index` as an error ends the run; of several processes the others have gone on."""
        if jax.process_count() == 1:
            log.flush()
            lanes.stand(iterator={"next_index": index})
            lanes.save(state)

    with ThreadPoolExecutor(1, "feed") as pool:
        coming = pool.submit(feed, index, pace.next(index, steps)) if index < steps else None
        while coming is not None:
            with phases("load"):
                try:
                    batches, count = coming.result()
                except DataError:
                    if index > saved:
                        keep(index)
                    raise
            with phases("train"):
                try:
                    state, values = step(state, batches) if feed.most == 1 else step(state, batches, np.int32(count))
                except Exception:
                    if lanes.sessions[0].writer_failed:
                        keep(index)  # raises what the writer has met with
                    raise
                del batches
                begin, index = index, index + count
                lanes.stand(step=at.step + count)
                coming = pool.submit(feed, index, pace.next(index, steps)) if index < steps else None
                log.put(begin, count, values, index == steps, stacked=feed.most > 1)
                pace.dispatched(count, values)
                answer = lanes.after_step(values)
            bar.update(count)
            if answer != control.GO_ON and index < steps:  # behind the last step the caller saves
                with phases("train"):
                    log.flush()
                lanes.stand(iterator={"next_index": index})
                lanes.save(state)
                saved = index
                lanes.stop_if_asked(answer)
    with phases("train"):
        log.flush()
        jax.block_until_ready(state)
    return state


class _Pace:
    """How many steps the next call takes."""

    def __init__(self, lanes: Lanes, most: int, asked: int):
        self._lanes, self._most = lanes, most
        self._count = min(asked, most) if asked else 1
        self._grows = not asked and most > 1
        self._before: tuple[int, PyTree] | None = None
        self._ended = time.perf_counter()

    def next(self, index: int, steps: int) -> int:
        """Of the steps from `index`: up to their end, or to a save by number."""
        every, taken = self._lanes.configs[0].checkpoint.every_steps, self._lanes.at.step
        return min(self._count, steps - index, every - taken % every if every else steps)

    def dispatched(self, count: int, values: PyTree) -> None:
        """A call is under way: waits for the one before it, and learns of how long that took."""
        before, self._before = self._before, (count, values)
        if before is None or self._most == 1:
            return
        jax.block_until_ready(before[1])
        now = time.perf_counter()
        seconds, self._ended = now - self._ended, now
        if self._grows and before[0] == self._count:
            milliseconds = self._lanes.strongest(int(1e3 * seconds))
            self._grows = 2 * milliseconds < 1e3 * CALL_SECONDS and self._count < self._most
            self._count = min(2 * self._count, self._most) if self._grows else self._count


class _LateLog:
    """Writes the metrics of a call when those of the next one to be logged come, so that the devices never wait for it."""

    def __init__(self, lanes: Lanes, steps_per_epoch: int):
        self._lanes, self._steps_per_epoch = lanes, steps_per_epoch
        # At most one call: the number of its first batch's step less that batch's, places in the metrics by batch, metrics.
        self._waiting: list[tuple[int, dict[int, int | None], PyTree]] = []

    def put(self, begin: int, count: int, values: PyTree, ends: bool, *, stacked: bool) -> None:
        """The metrics of the call just made, of `count` batches from `begin` of the present ones; `ends`: the last of them."""
        every = self._lanes.configs[0].log_every
        logged = [i for i in range(begin, begin + count) if i % every == 0 or (ends and i == begin + count - 1)]
        if logged:
            self.flush()
            first = self._lanes.at.step - count - begin  # the number of a step is its batch's and this, from 1
            self._waiting.append((first + 1, {i: i - begin if stacked else None for i in logged}, values))

    def flush(self) -> None:
        """Raises:
        Diverged: a loss is not finite.
        """
        while self._waiting:
            first, places, values = self._waiting.pop()
            host = jax.device_get(values)
            for index, place in places.items():
                mine = host if place is None else {name: x[place] for name, x in host.items()}
                self._write(first + index, index / self._steps_per_epoch, mine)

    def _write(self, step: int, epoch: float, values: PyTree) -> None:
        task = self._lanes.at.task
        each = [{name: float(x) for name, x in mine.items()} for mine in self._lanes.split(values)]
        for session, mine in zip(self._lanes.sessions, each, strict=True):
            session.log.write("train", step, {"task": task, "epoch": epoch, **mine})
        losses = [mine.get("loss", 0.0) for mine in each]
        if not np.isfinite(losses).all():
            what = f"the loss is {losses[0]}" if len(losses) == 1 else f"the loss of the seeds is {losses}"
            raise Diverged(diverged(what, step, task))
