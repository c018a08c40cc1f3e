"""brax's UniformSamplingQueue, raw on one device and sharded as brax shards it (its `PjitWrapper`).

A row is ravelled to one dtype, int32 here, and a full queue is rolled as a whole at every insert. Raw: insert and
sample are jitted together with the state donated, as in brax's own training loops. Sharded: the wrapper's own insert
and sample, which donate nothing; each device samples its own shard only.
"""

import importlib.metadata
from typing import Any

import jax
import numpy as np

from experiments.bench.peers import jax_peer, protocol


class BraxRaw(jax_peer.DonatedPeer):
    name = "brax"
    note = "stores int32; rolls the whole queue at every insert; draws with replacement"
    peak = 10.0

    def __init__(self, sizes: protocol.Sizes) -> None:
        from brax.training import replay_buffers

        super().__init__(sizes)
        self.started(importlib.metadata.version("brax"))
        queue = replay_buffers.UniformSamplingQueue(sizes.capacity, jax_peer.one_record(), sizes.batch)

        def insert_and_sample(state: Any, rows: Any, key: Any) -> tuple[Any, Any]:
            del key  # brax keeps one in its state
            return queue.sample_internal(queue.insert_internal(state, rows))

        self.bind(queue.init(jax.random.PRNGKey(0)), insert_and_sample, queue.insert_internal)


class BraxSharded(jax_peer.JaxPeer):
    name = "brax_sharded"
    note = "as brax, a queue a device; each device draws from its own rows only; nothing donated"
    peak = 12.0
    one_device = False

    def __init__(self, sizes: protocol.Sizes) -> None:
        from brax.training import replay_buffers

        super().__init__(sizes)
        self.started(importlib.metadata.version("brax"))
        mesh = jax.sharding.Mesh(np.array(jax.devices()[: sizes.devices]), ("x",))
        self.sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        queue = replay_buffers.UniformSamplingQueue(sizes.capacity, jax_peer.one_record(), sizes.batch)
        self._queue = replay_buffers.PjitWrapper(queue, mesh=mesh, axis_names=("x",))
        self.state = self._queue.init(jax.random.PRNGKey(0))

    def fill(self) -> None:
        rows = self.sizes.capacity * self.sizes.devices
        for some in protocol.fill_chunks(rows, chunk=max(rows // 4, 1)):  # each insert copies the whole queue
            self.insert(self.place(some))

    def insert(self, rows: Any) -> None:
        self.state = jax.block_until_ready(self._queue.insert(self.state, rows))

    def step(self, batch: Any) -> None:
        self.state = self._queue.insert(self.state, batch)
        self.state, drawn = self._queue.sample(self.state)
        jax.block_until_ready((self.state, drawn))


if __name__ == "__main__":
    protocol.main(BraxRaw, BraxSharded)
