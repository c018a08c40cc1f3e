"""The optimiser's directions against the formulas, and the schedules in epochs of a task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.optimizer import make_optimizer, make_schedule, with_batch_rule
from jaxcl.training.config import default_config
from tests.rig import close

GRADS = [{"w": np.float32([3.0, 0.0]), "b": np.float32(-4.0)}, {"w": np.float32([0.3, 0.4]), "b": np.float32(0.0)}]
PARAMS = {"w": np.float32([1.0, -2.0]), "b": np.float32(0.5)}


def config_of(**changes):
    config = default_config().optimizer
    config.update(changes)
    return config


def directions(**changes):
    """Those of two gradients in turn, at the same parameters."""
    optimizer, found = make_optimizer(config_of(**changes)), []
    state = optimizer.init(PARAMS)
    for grads in GRADS:
        direction, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, PARAMS)
        found.append(direction)
    return found


def test_a_gradient_is_scaled_down_to_the_norm_and_never_up():
    """Of norms 5 and 0.5: the first comes down to 2, the second stays."""
    close(directions(clip_norm=2.0), [jax.tree.map(lambda g: 0.4 * g, GRADS[0]), GRADS[1]])
    close(directions(), GRADS)


def test_clipping_is_of_the_gradient_alone_and_decay_enters_before_the_momentum():
    first, second = directions(clip_norm=2.0, weight_decay=0.1, momentum=0.9)
    one = jax.tree.map(lambda g, p: 0.4 * g + 0.1 * p, GRADS[0], PARAMS)
    close(first, one)
    close(second, jax.tree.map(lambda m, g, p: 0.9 * m + g + 0.1 * p, one, GRADS[1], PARAMS))
    nesterov, _ = directions(momentum=0.9, nesterov=True)
    close(nesterov, jax.tree.map(lambda g: 1.9 * g, GRADS[0]))


def test_the_decay_of_adamw_is_decoupled():
    first, _ = directions(name="adamw", weight_decay=0.1)
    signs = jax.tree.map(lambda g, p: np.sign(g) + 0.1 * p, GRADS[0], PARAMS)
    close(first, signs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0: 1.0, 3.9: 1.0}),
        ({"schedule": "cosine"}, {0: 1.0, 2: 0.5, 4: 0.0}),
        ({"schedule": "steps", "decay_epochs": (1, 3), "decay_factors": (0.5, 0.1)}, {0.9: 1.0, 1.1: 0.5, 3.1: 0.1}),
        ({"warmup_epochs": 1.0, "warmup_from": 0.2}, {0: 0.2, 0.5: 0.6, 1: 1.0, 3: 1.0}),
        ({"warmup_epochs": 2.0, "schedule": "cosine"}, {0: 0.0, 1: 0.5, 2: 1.0, 3: 0.5, 4: 0.0}),
        (
            {"warmup_epochs": 1.0, "schedule": "steps", "decay_epochs": (2,), "decay_factors": (0.5,)},
            {0.5: 0.5, 1.5: 1.0, 2.5: 0.5},
        ),
    ],
    ids=str,
)
def test_schedules(changes, expected):
    """Shares of the learning rate by the epoch, of four."""
    schedule = make_schedule(config_of(learning_rate=0.2, **changes), epochs=4)
    for epoch, share in expected.items():
        assert float(schedule(jnp.float32(epoch))) == pytest.approx(0.2 * share, rel=1e-5, abs=1e-7)


MATRIX = {"w": np.float32([[3.0, 0.0], [0.0, 4.0]]), "b": np.float32([1.0, 2.0])}
SLOPE = {"w": np.float32([[1.0, 2.0], [2.0, 0.0]]), "b": np.float32([0.5, -0.5])}


def test_lars_scales_a_layer_to_the_length_of_its_weights_and_leaves_biases_alone():
    optimizer = make_optimizer(config_of(name="lars", weight_decay=0.1, momentum=0.9, trust=0.02))
    state = optimizer.init(MATRIX)
    first, state = optimizer.update(jax.tree.map(jnp.asarray, SLOPE), state, MATRIX)
    decayed = SLOPE["w"] + 0.1 * MATRIX["w"]
    one = 0.02 * 5 / np.linalg.norm(decayed) * decayed
    close(first, {"w": one, "b": SLOPE["b"]})
    second, _ = optimizer.update(jax.tree.map(jnp.asarray, SLOPE), state, MATRIX)
    close(second, {"w": 1.9 * one, "b": 1.9 * SLOPE["b"]})


def test_lamb_scales_adams_direction_with_its_decay():
    optimizer = make_optimizer(config_of(name="lamb", weight_decay=0.1))
    first, _ = optimizer.update(jax.tree.map(jnp.asarray, SLOPE), optimizer.init(MATRIX), MATRIX)
    direction = np.sign(SLOPE["w"]) + 0.1 * MATRIX["w"]
    expected = {"w": 5 / np.linalg.norm(direction) * direction, "b": np.sign(SLOPE["b"])}
    close(first, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rule", "times"), [("none", 1), ("linear", 16), ("sqrt", 4)])
def test_the_learning_rate_goes_with_the_batch(rule, times):
    config = config_of(learning_rate=0.2, batch_rule=rule, base_batch=64)
    assert with_batch_rule(config, 1024).learning_rate == pytest.approx(0.2 * times)
    assert config.learning_rate == 0.2
