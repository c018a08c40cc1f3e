"""How the processes of a run agree on what interrupts it: a signal, the clock. And what ends one whose others are lost.

The processes of a run execute the same collectives in the same order, so none may save or stop alone. Each puts its wish into
a tiny collective beside every step and reads the common answer two steps later, when it has long arrived: no step waits.
"""

import collections
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import mesh as mesh_lib

GO_ON, SAVE, STOP = 0, 1, 2  # wishes; the strongest of all processes counts
LAG = 2  # steps between a wish and its fulfilment, in a run of several processes


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
        local = mesh_lib.row_shards(self._mesh) // jax.process_count()
        return self._strongest(mesh_lib.shard_rows(self._mesh, np.full(local, wish, np.int32)))


class Watchdog:
    """Ends this process, one of several, when nothing has been finished for too long.

    A collective whose peer has died or hangs does not return, and nothing in this process can make it; what JAX's heartbeats
    do not notice (a process that lives and never arrives) ends here. Counted in wake-ups of one second, so that neither a
    jump of the clock nor a suspended process looks like a stall.

    Args:
      start: seconds until the first thing is finished, most of which is compilation; None or 0: for ever.
      stall: seconds for everything after it.
    """

    def __init__(self, start: float | None, stall: float | None):
        self._limit, self._stall, self._idle, self._what = start, stall, 0, "the start"
        self._end = threading.Event()
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def done(self, what: str) -> None:
        """Something was finished."""
        self._idle, self._what, self._limit = 0, what, self._stall

    def close(self) -> None:
        self._end.set()

    def _watch(self) -> None:
        while not self._end.wait(1.0):
            self._idle += 1
            limit = self._limit
            if limit and self._idle > limit:
                mesh_lib.end_lost(
                    f"process {jax.process_index()} of {jax.process_count()}: nothing was finished for "
                    f"{limit:g} s after {self._what}"
                )
