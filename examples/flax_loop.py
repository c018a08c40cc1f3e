"""Experience replay in a Flax training loop of one's own: two more lines than a loop without it.

    python -m examples.flax_loop

A small network learns the handwritten digits, two classes at a time, on 8 fake devices. Each step trains on 32 new images and
on 32 that are drawn from all that came so far.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from jaxcl.buffer import Drawn, Rows, make_buffer
from jaxcl.data import open_source
from jaxcl.mesh import make_mesh, shard_rows, use_fake_devices

BATCH, EPOCHS = 32, 10


class Net(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1) / 255
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


@jax.jit
def train_step(state: TrainState, rows: Rows, drawn: Drawn) -> TrainState:
    """Descends the mean cross-entropy over the new rows and the drawn ones that are valid."""
    images = jnp.concatenate([rows.record["image"], drawn.record["image"]])
    labels = jnp.concatenate([rows.label, drawn.label])
    weight = jnp.concatenate([jnp.ones(len(rows.label)), drawn.valid])

    def loss(params):
        each = optax.softmax_cross_entropy_with_integer_labels(state.apply_fn(params, images), labels)
        return jnp.sum(each * weight) / jnp.sum(weight)

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def main(replay: bool) -> float:
    """Accuracy on all test images after the last task."""
    train, test = open_source("digits")
    mesh, net, rng = make_mesh(), Net(), np.random.default_rng(0)
    params = net.init(jax.random.key(0), np.zeros((1, *train.image_shape)))
    state = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1, momentum=0.9))

    record = {"image": jax.ShapeDtypeStruct(train.image_shape, np.uint8)}
    buffer = make_buffer(record, capacity=200, representatives=BATCH, policy="reservoir", mesh=mesh)
    memory, drawn, step = buffer.init(), buffer.no_rows(), 0
    for task in range(5):
        own = np.flatnonzero(train.labels // 2 == task)
        for _ in range(EPOCHS):
            order = rng.permutation(own)
            for first in range(0, len(order) - BATCH + 1, BATCH):
                index = order[first : first + BATCH]
                rows = shard_rows(mesh, Rows({"image": train.read(index)}, train.labels[index]))
                state = train_step(state, rows, drawn)
                if replay:
                    memory, drawn = buffer.insert_and_draw(memory, rows, jax.random.key(step))
                step += 1
    logits = np.asarray(net.apply(state.params, test.read(np.arange(len(test)))))
    return float(np.mean(np.argmax(logits, axis=1) == test.labels))


if __name__ == "__main__":
    use_fake_devices(8)
    with_replay, without = main(replay=True), main(replay=False)
    print(f"accuracy over all tasks: {with_replay:.2f} with replay, {without:.2f} without")
    assert with_replay > 0.8 and without < 0.4
