"""Rules for large batches in a whole config, and the gradient noise scale against its formula from the rows of each device."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.losses import cross_entropy
from jaxcl.strategies import make_strategy
from jaxcl.training.build import build, schedule_of
from jaxcl.training.config import check_config, default_config
from jaxcl.training.large_batch import epochs_of
from jaxcl.training.noise import noise_scale
from tests.rig import Rig, close, make_batch, make_draw


def config_of(**changes):
    config = default_config()
    config.update({"batch_size": 256, "epochs": 2} | {k: v for k, v in changes.items() if k != "optimizer"})
    config.optimizer.update(changes.get("optimizer", {}))
    return config


def test_training_longer_takes_as_many_updates_with_a_schedule_as_much_longer():
    plain = config_of(batch_size=64, optimizer={"schedule": "cosine", "warmup_epochs": 0.5})
    long = config_of(optimizer={"schedule": "cosine", "warmup_epochs": 0.5, "train_longer": True, "batch_rule": "sqrt"})
    assert (epochs_of(plain), epochs_of(long)) == (2, 8)
    strategy = make_strategy("er")
    for epoch in (0.0, 0.25, 1.0, 1.9):
        one, other = schedule_of(plain, strategy)(np.float32(epoch)), schedule_of(long, strategy)(np.float32(4 * epoch))
        np.testing.assert_allclose(other, 2 * one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({"batch_size": 96, "epochs": 1, "optimizer": {"train_longer": True}}, 1, "base_batch: 64 is not allowed"),
        ({"optimizer": {"noise_scale": True}}, 1, "noise_scale: True is not allowed, give False on one device"),
        (
            {"optimizer": {"batch_rule": "cubic"}},
            1,
            "batch_rule: 'cubic' is not allowed, give one of none, linear, sqrt",
        ),
        ({"optimizer": {"base_batch": 0}}, 1, "base_batch: 0 is not allowed, give a positive number"),
    ],
)
def test_bad_rules(changes, devices, message):
    with pytest.raises(UserError, match=f"optimizer.{message}"):
        check_config(config_of(**changes), devices)


@pytest.mark.parametrize(
    ("options", "devices", "refused"),
    [
        ({"norm": "sync"}, 2, "False with model.options.norm = sync, in which rows of several devices meet"),
        ({"norm": "ghost", "norm_options": {"rows": 32}}, 4, "False with model.options.norm = ghost, in which"),
        ({"norm": "ghost", "norm_options": {"rows": 32}}, 2, None),
        ({"norm": "layer"}, 4, None),
        ({}, 4, None),  # local
    ],
)
def test_gradients_of_rows_that_meet_are_not_compared(options, devices, refused, mesh_of):
    mesh_of(devices)
    config = config_of(batch_size=64, optimizer={"noise_scale": True})
    config.model.name, config.model.options = "mlp_norm", {"hidden": (4,), **options}
    if refused is None:
        build(config, jax.devices()[:devices])
        return
    with pytest.raises(UserError, match=f"^optimizer.noise_scale: True is not allowed, give {refused}"):
        build(config, jax.devices()[:devices])


def test_the_estimates_are_those_of_the_gradients_of_each_devices_rows(mesh_of):
    """All rows valid; two devices; against gradients of the mean loss over the rows of each."""
    batch, draw = make_batch(0), make_draw(1)
    batch["valid"][:] = True
    draw = dataclasses.replace(draw, valid=np.ones_like(draw.valid))
    rig = Rig(mesh_of(2), make_strategy("er"), "mlp", noise=True)
    state = rig.stage(rig.state(stored=False), [draw])
    params = jax.device_get(state.params)
    _, metrics = rig.step(state, rig.rows(batch))

    def slope(rows, drawn):
        images = np.concatenate([batch["image"][rows], draw.record["image"][drawn]]) / np.float32(255)
        labels = np.concatenate([batch["label"][rows], draw.label[drawn]])

        def loss(params):
            return cross_entropy(rig.model.apply(params, {}, images, train=True)[0]["logits"], labels).mean()

        grads = jax.tree.leaves(jax.grad(loss)(params))
        return np.concatenate([np.ravel(g) for g in grads]).astype(np.float64)

    b, r = len(batch["label"]), len(draw.label)
    halves = [slope(slice(0, b // 2), slice(0, r // 2)), slope(slice(b // 2, b), slice(r // 2, r))]
    small = np.mean([g @ g for g in halves])
    large = np.mean(halves, 0) @ np.mean(halves, 0)
    one, whole = (b + r) / 2, b + r
    close(metrics["gradient_square"], np.float32((whole * large - one * small) / (whole - one)), rtol=1e-3, atol=1e-6)
    close(metrics["gradient_noise"], np.float32((small - large) / (1 / one - 1 / whole)), rtol=1e-3, atol=1e-6)
    plain = Rig(mesh_of(2), make_strategy("er"), "mlp")
    state = plain.stage(plain.state(stored=False), [draw])
    assert "gradient_noise" not in plain.step(state, plain.rows(batch))[1]


def test_the_noise_scale_is_a_ratio_of_means():
    assert noise_scale([1.0, 3.0, np.nan], [10.0, 30.0, 1.0]) == 10.0
    assert noise_scale([-1.0], [3.0]) == np.inf
