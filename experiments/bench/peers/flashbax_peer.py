"""flashbax's item buffer: a ring on one device, drawn from uniformly with replacement.

Add and sample are jitted together with the state donated, which is how it is fastest.
"""

import importlib.metadata
import importlib.util
from typing import Any

from experiments.bench.peers import jax_peer, protocol


def available(path: str | None = None) -> str | None:
    """Why this peer cannot run here, or None."""
    return None if importlib.util.find_spec("flashbax") else "flashbax is not installed"


class Flashbax(jax_peer.DonatedPeer):
    name = "flashbax"
    note = "overwrites the oldest; draws with replacement"
    peak = 1.2

    def __init__(self, capacity: int, row_shape: tuple[int, ...], batch: int, devices: int, path: str | None) -> None:
        if reason := available():
            raise protocol.Missing(reason)
        if devices != 1:
            raise protocol.Missing("flashbax has no buffer over several devices")
        import flashbax

        jax_peer.start(1)
        self.version = jax_peer.version(importlib.metadata.version("flashbax"))
        buffer = flashbax.make_item_buffer(max_length=capacity, min_length=1, sample_batch_size=batch, add_batches=True)

        def add_and_sample(state: Any, rows: Any, key: Any) -> tuple[Any, Any]:
            state = buffer.add(state, rows)
            return state, buffer.sample(state, key).experience

        state = buffer.init(jax_peer.one_record(row_shape))
        self.bind(state, add_and_sample, buffer.add, capacity, row_shape, batch)


if __name__ == "__main__":
    protocol.main(Flashbax)
