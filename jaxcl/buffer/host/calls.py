"""The host tier by the names of the device tier: `insert`, `draw`, `ask` and `collect` in anyone's loop, outside `jit`.

A compiled program decides on the devices where rows go and which ones are drawn. The caller's thread stores and gathers
them: when a draw is collected, or the next call needs them, so that what was dispatched in between runs meanwhile.

The rows belong to one state: the one that the last call returned. It may go through the user's own programs and come back.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxcl.buffer.buffer import Local, Sizes
from jaxcl.buffer.draw import NONE, Plan
from jaxcl.buffer.host import feed
from jaxcl.buffer.host.messages import Asked, Handover, Pending
from jaxcl.buffer.host.store import Store
from jaxcl.buffer.rows import check_rows
from jaxcl.buffer.shard import Drawn, Rows, Shard
from jaxcl.check import refused
from jaxcl.errors import UserError
from jaxcl.mesh import WHOLE, on_mesh

WAY = "insert, draw, ask and collect"


class Calls:
    """The functions of the host tier over all devices."""

    def __init__(self, sizes: Sizes, mesh: Mesh, store: Store):
        self._sizes, self._store = sizes, store
        local = feed.bind(sizes, store, "outputs", on_cpu=mesh.local_devices[0].platform == "cpu")
        self._last: Any = None  # an array of the state that the last call returned
        rows = PartitionSpec(sizes.axis)
        on = functools.partial(on_mesh, mesh)
        self._turn = on(functools.partial(_turn, local, 0), (rows, rows, WHOLE), rows, donate=0)
        self._turn_and_draw = on(functools.partial(_turn, local, 1), (rows, rows, WHOLE), rows, donate=0)
        self._stage = on(lambda state, key: local.stage(state, [key]), (rows, WHOLE), rows)
        self._receive = on(lambda staged, arrived: local.receive(staged, arrived)[0], (rows, rows), rows)

    def insert(self, state: Shard, rows: Rows, key: jax.Array) -> Shard:
        """As in the device tier; `state` is donated."""
        return self._ask(self._turn, state, rows, key)[0]

    def draw(self, state: Shard, key: jax.Array) -> Drawn:
        """As in the device tier."""
        self._serve(state, key)
        self._store.catch_up()
        staged = self._stage(state, key)
        return self._receive(staged, self._store.gather(staged))

    def insert_and_draw(self, state: Shard, rows: Rows, key: jax.Array) -> tuple[Shard, Drawn]:
        """As in the device tier."""
        state, asked = self.ask(state, rows, key)
        return state, self.collect(asked)

    def ask(self, state: Shard, rows: Rows, key: jax.Array) -> tuple[Shard, Asked]:
        """`insert_and_draw` that only dispatches what decides; waits only where `queue` others were not collected."""
        return self._ask(self._turn_and_draw, state, rows, key)

    def collect(self, asked: Asked | Pending) -> Drawn:
        """The rows that were asked for, as they were stored then; also of `no_rows()`."""
        if isinstance(asked, Pending):
            ranks = asked.picked.rank if isinstance(asked.picked, Plan) else asked.picked
            if any(np.any(np.asarray(part.data) != NONE) for part in ranks.addressable_shards):
                raise UserError(
                    "buffer: rows of `stage` come within `serving` alone, give what `ask` returned to `collect`"
                )
            return self._receive((asked,), self._store.gather((asked,)))
        self._store.catch_up(asked)
        if asked.arrived is None:
            raise UserError("buffer: what is to be collected was asked of another buffer, or before `restore`")
        return self._receive(asked.staged, asked.arrived)

    def _ask(self, program: Any, state: Shard, rows: Rows, key: jax.Array) -> tuple[Shard, Asked]:
        self._serve(state, (rows, key))
        labelled = self._sizes.policy.classes is not None
        n = check_rows(
            self._sizes.record, rows, labelled=labelled, weighted=self._sizes.weighted, shards=self._sizes.shards
        )
        state, staged, (handover,) = program(state, rows, key)
        asked = Asked(handover, staged)
        assert self._store.came is not None
        self._last, self._store.came = state.came, (self._store.came + n // self._sizes.shards) % 2**32
        self._store.put_off(asked)
        return state, asked

    def _serve(self, state: Shard, rest: Any) -> None:
        """Raises:
        UserError: the state is not that of the stored rows, or the call is traced.
        """
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((state, rest))):
            raise refused("buffer.tier", "host", "device under jit: what is traced does not move rows on the host")
        self._store.go(WAY)
        served = self._store.came
        if served is not None and state.came is self._last:
            return
        came = _count(state.came)
        if came is None or served not in (None, came):
            why = "this one was given away"
            if came is not None:
                why = f"{served} rows came to each device by it and {came} by this"
            raise UserError(f"buffer: a memory of the host tier serves the state that its last call returned: {why}")
        self._store.came = came


def _turn(
    local: Local, draws: int, state: Shard, rows: Rows, key: jax.Array
) -> tuple[Shard, tuple[Pending, ...], tuple[Handover, ...]]:
    insert_key, *draw_keys = jax.random.split(key) if draws else (key,)
    return local.turn(state, rows, insert_key, draw_keys, jnp.int32(0))


def _count(came: Any) -> int | None:
    """The rows that have come to each device, as a state says; None if it was donated."""
    if isinstance(came, jax.Array):
        if came.is_deleted():
            return None
        came = came.addressable_shards[0].data
    return int(np.asarray(came)[0]) % 2**32
