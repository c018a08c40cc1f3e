"""brax's UniformSamplingQueue, raw on one device and sharded as brax shards it (its `PjitWrapper`).

A row is ravelled to one dtype, int32 here, and a full queue is rolled as a whole at every insert. Raw: insert and
sample are jitted together with the state donated, as in brax's own training loops. Sharded: the wrapper's own insert
and sample, which donate nothing; each device samples its own shard only.
"""

import importlib.metadata
import importlib.util
from typing import Any

import jax
import numpy as np

from experiments.bench.peers import jax_peer, protocol


def available(path: str | None = None) -> str | None:
    """Why this peer cannot run here, or None."""
    return None if importlib.util.find_spec("brax") else "brax is not installed"


class BraxRaw(jax_peer.DonatedPeer):
    name = "brax"
    note = "stores int32; rolls the whole queue at every insert; draws with replacement"
    peak = 10.0

    def __init__(self, capacity: int, row_shape: tuple[int, ...], batch: int, devices: int, path: str | None) -> None:
        if reason := available():
            raise protocol.Missing(reason)
        if devices != 1:
            raise protocol.Missing("brax's raw queue lives on one device")
        from brax.training import replay_buffers

        jax_peer.start(1)
        self.version = jax_peer.version(importlib.metadata.version("brax"))
        queue = replay_buffers.UniformSamplingQueue(capacity, jax_peer.one_record(row_shape), batch)

        def insert_and_sample(state: Any, rows: Any, key: Any) -> tuple[Any, Any]:
            del key  # brax keeps one in its state
            return queue.sample_internal(queue.insert_internal(state, rows))

        state = queue.init(jax.random.PRNGKey(0))
        self.bind(state, insert_and_sample, queue.insert_internal, capacity, row_shape, batch)


class BraxSharded(protocol.Peer):
    name = "brax_sharded"
    note = "as brax, a queue a device; each device draws from its own rows only; nothing donated"
    peak = 12.0

    def __init__(self, capacity: int, row_shape: tuple[int, ...], batch: int, devices: int, path: str | None) -> None:
        if reason := available():
            raise protocol.Missing(reason)
        from brax.training import replay_buffers

        jax_peer.start(devices)
        self.version = jax_peer.version(importlib.metadata.version("brax"))
        self.device = jax_peer.device(devices)
        self._rows, self._row_shape = capacity * devices, row_shape
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("x",))
        self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        queue = replay_buffers.UniformSamplingQueue(capacity, jax_peer.one_record(row_shape), batch)
        self._queue = replay_buffers.PjitWrapper(queue, mesh=mesh, axis_names=("x",))
        self._state = self._queue.init(jax.random.PRNGKey(0))

    def fill(self) -> None:
        # Each insert copies the whole queue: few large ones.
        for rows in protocol.fill_chunks(self._rows, self._row_shape, chunk=max(self._rows // 4, 1)):
            self._state = jax.block_until_ready(self._queue.insert(self._state, self.place(rows)))

    def place(self, rows: protocol.Rows) -> Any:
        return jax.device_put(jax_peer.record(rows), self._sharding)

    def step(self, batch: Any) -> None:
        self._state = self._queue.insert(self._state, batch)
        self._state, drawn = self._queue.sample(self._state)
        jax.block_until_ready((self._state, drawn))

    def bytes(self) -> int:
        return jax_peer.tree_bytes(self._state)


if __name__ == "__main__":
    protocol.main(BraxRaw, BraxSharded)
