"""flashbax's item buffer: a ring on one device, drawn from uniformly with replacement.

Add and sample are jitted together with the state donated, which is how it is fastest.
"""

import importlib.metadata
from typing import Any

from experiments.bench.peers import jax_peer, protocol


class Flashbax(jax_peer.DonatedPeer):
    name = "flashbax"
    note = "overwrites the oldest; draws with replacement"
    peak = 1.2

    def __init__(self, sizes: protocol.Sizes) -> None:
        import flashbax

        super().__init__(sizes)
        self.started(importlib.metadata.version("flashbax"))
        buffer = flashbax.make_item_buffer(
            max_length=sizes.capacity, min_length=1, sample_batch_size=sizes.batch, add_batches=True
        )

        def add_and_sample(state: Any, rows: Any, key: Any) -> tuple[Any, Any]:
            state = buffer.add(state, rows)
            return state, buffer.sample(state, key).experience

        self.bind(buffer.init(jax_peer.one_record()), add_and_sample, buffer.add)


if __name__ == "__main__":
    protocol.main(Flashbax)
