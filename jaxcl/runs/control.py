"""What may interrupt a run, and how several processes agree on it: SIGTERM, the clock, a process that died.

The processes of a run execute the same collectives in the same order, so none may save or stop alone. Each puts its wish into
a tiny collective beside every step and reads the common answer two steps later, when it has long arrived: no step waits.
"""

import collections
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import mesh as mesh_lib
from jaxcl.errors import Preempted

GO_ON, SAVE, STOP = 0, 1, 2  # wishes; the strongest of all processes counts
LAG = 2  # steps between a wish and its fulfilment, in a run of several processes
_ending = threading.Lock()


def end_at_sigterm() -> None:
    """From now on SIGTERM ends this process at once with one line and the status of `Preempted`, but while a session is open.

    For commands; to be called in the main thread. Another thread ends the process, since in the main one Python handles no
    signal while JAX waits for other processes or compiles.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, _end)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_when_told, args=(reader,), name="sigterm", daemon=True).start()


def _end_when_told(reader: int) -> None:
    while number := os.read(reader, 1):  # of every signal that Python handles
        if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is _end:
            _end(number[0], None)


def _end(number: int, frame: FrameType | None) -> None:
    if not _ending.acquire(blocking=False):  # the other thread, or a second signal
        return
    print("error: SIGTERM: told to stop while nothing was being trained; start again", file=sys.stderr, flush=True)
    os._exit(Preempted.status)


class Preemption:
    """Remembers a SIGTERM while it is entered, until the run is at a step where it can be saved. In a thread other than the
    main one, where Python allows no handler, it does nothing."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


class Agreement:
    """One answer for all processes. Every process must make the same calls."""

    def __init__(self, mesh: jax.sharding.Mesh):
        self._mesh = mesh
        self._waiting: collections.deque[tuple[jax.Array, Any]] = collections.deque()
        self._strongest = jax.jit(jnp.max, out_shardings=mesh_lib.replicated(mesh))

    def at_step(self, wish: int, after: Any) -> int:
        """The strongest wish: of now in a run of one process, of `LAG` calls ago in a run of several.

        Args:
          wish: GO_ON, SAVE or STOP.
          after: outputs of the present step; by the time its wish is read the step has ended.
        """
        if jax.process_count() == 1:
            return wish
        self._waiting.append((self._ask(wish), after))
        if len(self._waiting) <= LAG:
            return GO_ON
        answer, after = self._waiting.popleft()
        jax.block_until_ready(after)
        return int(answer)

    def now(self, wish: int) -> int:
        """The strongest wish; waits for it."""
        return wish if jax.process_count() == 1 else int(self._ask(wish))

    def forget(self) -> None:
        """Drops wishes not yet read, which a save has just fulfilled. Who wants to stop says so at every step."""
        self._waiting.clear()

    def _ask(self, wish: int) -> jax.Array:
        local = self._mesh.size // jax.process_count()
        return self._strongest(mesh_lib.shard_rows(self._mesh, np.full(local, wish, np.int32)))


class Watchdog:
    """Ends this process, one of several, when nothing has been finished for `seconds`.

    A collective whose peer has died or hangs does not return, and nothing in this process can make it; what JAX's heartbeats
    do not notice (a process that lives and never arrives) ends here. Counted in wake-ups of one second, so that neither a
    jump of the clock nor a suspended process looks like a stall.
    """

    def __init__(self, seconds: float | None):
        self._limit, self._idle, self._what = seconds, 0, "the start"
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def done(self, what: str) -> None:
        """Something was finished; the first call starts the watch, since before it only compilation is slow."""
        self._idle, self._what = 0, what
        if self._thread is None and self._limit and jax.process_count() > 1:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._end.set()

    def _watch(self) -> None:
        assert self._limit is not None
        while not self._end.wait(1.0):
            self._idle += 1
            if self._idle > self._limit:
                mesh_lib.end_lost(
                    f"process {jax.process_index()} of {jax.process_count()}: nothing was finished for "
                    f"{self._limit:g} s after {self._what}"
                )
