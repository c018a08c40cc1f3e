"""The rehearsal buffer in a loop of one's own: plain JAX on 8 fake devices; without `use_fake_devices` on those there are.

    python -m examples.replay_loop

A linear classifier learns five tasks of two classes each, one after the other. Each step trains on 32 new rows and on 32 rows
drawn from all that came so far (experience replay); without them it ends knowing the last task alone.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.buffer import Drawn, Rows, make_buffer
from jaxcl.mesh import make_mesh, use_fake_devices

CLASSES, WIDTH, BATCH, STEPS = 10, 32, 32, 100
CENTRES = np.random.default_rng(0).normal(2, 1, (CLASSES, WIDTH)).astype(np.float32)


def rows_of(task: int, rng: np.random.Generator) -> Rows:
    """Noisy points around the centres of two classes."""
    label = rng.integers(2 * task, 2 * task + 2, BATCH).astype(np.int32)
    return Rows(CENTRES[label] + 0.5 * rng.normal(size=(BATCH, WIDTH)).astype(np.float32), label)


def loss(weights: jax.Array, rows: Rows, drawn: Drawn) -> jax.Array:
    """Mean cross-entropy over the new rows and the valid drawn ones."""
    x = jnp.concatenate([jnp.asarray(rows.record), drawn.record])
    label = jnp.concatenate([jnp.asarray(rows.label), drawn.label])
    weight = jnp.concatenate([jnp.ones(BATCH), drawn.valid])
    each = -jax.nn.log_softmax(x @ weights)[jnp.arange(len(label)), label]
    return jnp.sum(each * weight) / jnp.sum(weight)


@jax.jit
def train(weights: jax.Array, rows: Rows, drawn: Drawn) -> jax.Array:
    """A step of gradient descent."""
    return weights - 0.1 * jax.grad(loss)(weights, rows, drawn)


def accuracy(weights: jax.Array) -> float:
    """Over all classes, of new points."""
    rng = np.random.default_rng(1)
    tasks = [rows_of(task, rng) for task in range(CLASSES // 2)]
    return float(np.mean([np.mean(np.argmax(rows.record @ weights, axis=1) == rows.label) for rows in tasks]))


def main(replay: bool) -> float:
    """Accuracy over all tasks after the last one."""
    record = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)
    buffer = make_buffer(record, capacity=400, representatives=BATCH, policy="reservoir", mesh=make_mesh())
    state, drawn = buffer.init(), buffer.no_rows()
    weights, rng = jnp.zeros((WIDTH, CLASSES)), np.random.default_rng(2)
    for step in range(CLASSES // 2 * STEPS):
        rows = rows_of(step // STEPS, rng)
        weights = train(weights, rows, drawn)
        if replay:
            state, drawn = buffer.insert_and_draw(state, rows, jax.random.key(step))
    assert buffer.stats(state)["rows"] == (400 if replay else 0)
    return accuracy(weights)


if __name__ == "__main__":
    use_fake_devices(8)
    with_replay, without = main(replay=True), main(replay=False)
    print(f"accuracy over all tasks: {with_replay:.2f} with replay, {without:.2f} without")
    assert with_replay > 0.9 and without < 0.5
