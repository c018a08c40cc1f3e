"""The rehearsal buffer in host memory in a loop of one's own, its rows stored and gathered while the devices train.

    python -m examples.replay_loop_host

The problem of `replay_loop`. `ask` dispatches what decides which rows are stored and drawn, the training step is dispatched
behind it, and `collect` stores and gathers rows on the host meanwhile: a step trains on the rows that the step before asked
for. The loop runs in both tiers, and both end with the same weights, bit for bit.
"""

import jax
import jax.numpy as jnp
import numpy as np

from examples.replay_loop import BATCH, CLASSES, STEPS, WIDTH, accuracy, rows_of, train
from jaxcl.buffer import make_buffer
from jaxcl.mesh import make_mesh, use_fake_devices


def main(tier: str) -> jax.Array:
    """The weights after the last task."""
    record = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)
    buffer = make_buffer(record, capacity=400, representatives=BATCH, mesh=make_mesh(), tier=tier)
    state, drawn = buffer.init(), buffer.collect(buffer.no_rows())
    weights, rng = jnp.zeros((WIDTH, CLASSES)), np.random.default_rng(2)
    for step in range(CLASSES // 2 * STEPS):
        rows = rows_of(step // STEPS, rng)
        state, asked = buffer.ask(state, rows, jax.random.key(step))
        weights = train(weights, rows, drawn)
        drawn = buffer.collect(asked)
    return weights


if __name__ == "__main__":
    use_fake_devices(8)
    weights = main("host")
    print(f"accuracy over all tasks: {accuracy(weights):.2f}")
    assert accuracy(weights) > 0.9
    np.testing.assert_array_equal(weights, main("device"))
