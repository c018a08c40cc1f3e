"""Runs that differ in seed and numbers share one program, which takes these as arguments."""

import jax
import numpy as np
import pytest

from jaxcl.strategies import STRATEGIES, number_options
from jaxcl.training.build import build
from tests import whole
from tests.rig import make_batch

SAME = [
    {"seed": 7},
    {"optimizer__learning_rate": 0.5},
    {"optimizer__momentum": 0.5, "optimizer__weight_decay": 0.1, "optimizer__clip_norm": 2.0},
    {"strategies__der_pp__alpha": 0.7, "strategies__der_pp__beta": 0.9},
]
OTHER = [{"optimizer__momentum": 0.0}, {"optimizer__nesterov": True}, {"buffer__representatives": 16}]


def program(**changes):
    """The step's program as text, and what it gives for one batch."""
    given = {"strategy": "der_pp", "optimizer__weight_decay": 0.01, "optimizer__clip_norm": 1.0, **changes}
    parts = build(whole.small(**given), jax.devices()[:1])
    state = parts.new_state(parts.new_weights(jax.random.key(0)))
    batch = jax.device_put(make_batch(0), state.step.sharding)
    return parts.train_step.lower(state, batch)[0].as_text()


@pytest.fixture(scope="module")
def plain():
    return program()


@pytest.mark.parametrize("changes", SAME)
def test_one_program_serves_all(changes, plain):
    assert program(**changes) == plain


@pytest.mark.parametrize("changes", OTHER)
def test_what_changes_the_computation_changes_the_program(changes, plain):
    assert program(**changes) != plain


def test_which_options_are_numbers():
    assert {name: number_options(name) for name in ("der", "der_pp", "lwf", "er", "gdumb")} == {
        "der": ["alpha"],
        "der_pp": ["alpha", "beta"],
        "lwf": ["alpha", "temperature"],
        "er": [],
        "gdumb": [],
    }
    for name in STRATEGIES:
        assert all(np.isscalar(STRATEGIES.options(name)[option]) for option in number_options(name))
