"""The prior of a step, `loss.prior = balanced`: logits + log of the expected rows of each class, against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.mesh import ROWS, WHOLE, on_mesh
from jaxcl.strategies import STRATEGIES, make_strategy
from jaxcl.training.config import check_config, default_config, prior_of
from jaxcl.training.learn import learn
from jaxcl.training.state import specs
from tests.rig import DRAWN, RATE, K, Rig, close, make_batch, make_draw

# Without a memory, or with a way of their own with the bias.
UNCORRECTED = {
    *("from_scratch", "incremental", "joint", "ewc", "l2", "lwf", "feature_distillation"),
    *("er_ace", "uer", "bic", "icarl", "dytox", "simplecil", "ranpac", "slca"),
}
HELD = np.array([17, 9, 6, 0, 5, 3], np.int32)  # rows of each class in a memory


def log_of(expected):
    """A class without rows counts as the rarest of the others."""
    return np.log(np.where(expected > 0, expected, expected[expected > 0].min())).astype(np.float32)


def rig_of(mesh, name, **options):
    return Rig(mesh, make_strategy(name), prior="balanced", **options)


def learned(rig, batch, draw, held=HELD):
    """The parameters before, the state after and the metrics of a step that replays this draw, but for insert and draw."""

    def one(state, batch, held):
        drawn = DRAWN * held / jnp.sum(held) if rig.strategy.draws else None
        after, _, metrics = learn(rig.bound, jax.random.key(0), state, batch, drawn)
        return after, metrics

    state = rig.stage(rig.state(stored=False), [draw] * rig.strategy.draws)
    step = on_mesh(rig.mesh, one, (specs(), ROWS, WHOLE), (specs(), WHOLE))
    return jax.device_get(state.params), *step(state, rig.rows(batch), held)


def loss_of(rig, params, parts, log_prior, allowed=None):
    """The weighted sum of cross-entropies; `parts` are (image, label, weight of each row)."""
    total = 0.0
    for image, label, weight in parts:
        logits = rig.model.apply(params, {}, image / np.float32(255), train=True)[0]["logits"] + log_prior
        logits = logits if allowed is None else jnp.where(allowed[label], logits, -1e30)
        log_p = jax.nn.log_softmax(logits)
        total -= jnp.sum(weight * log_p[jnp.arange(len(label)), label])
    return total


def valid_rows(batch, draw):
    new = batch["image"][batch["valid"]], batch["label"][batch["valid"]]
    old = draw.record["image"][draw.valid], draw.label[draw.valid]
    return new, old


@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize("devices", [1, 4])
def test_the_loss_is_that_of_the_expected_rows(devices, weight, mesh_of):
    """n_k = rows of the batch so far by class, and weighted rows drawn by the memory's shares of the classes."""
    batch, draw = make_batch(0, (0, 2, 5)), make_draw(1)
    rig = rig_of(mesh_of(devices), "er", replay_weight=weight)
    before, after, metrics = learned(rig, batch, draw)

    (x, y), (u, v) = valid_rows(batch, draw)
    arrived = np.bincount(y, minlength=K)
    expected = arrived / arrived.sum() * len(y) + weight * len(v) * HELD / HELD.sum()
    log_prior = log_of(expected)
    whole = len(y) + weight * len(v)
    parts = [(x, y, 1 / whole), (u, v, weight / whole)]
    value, grads = jax.value_and_grad(lambda p: loss_of(rig, p, parts, log_prior))(before)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    close(jax.device_get(after.params), jax.tree.map(lambda p, g: p - RATE * g, before, grads))
    np.testing.assert_array_equal(after.arrived, arrived)


@pytest.mark.parametrize("name", ["er", "der_pp", "agem", "mir"])
def test_any_number_of_devices_takes_the_same_step(name, mesh_of):
    batch, draw = make_batch(0, (0, 2, 5)), make_draw(1, logits=name == "der_pp")
    found = []
    for devices in (1, 8):
        _, after, metrics = learned(rig_of(mesh_of(devices), name), batch, draw)
        found.append(jax.device_get((after.params, after.arrived, metrics)))
    close(*found)


def test_a_loss_of_means_has_the_prior_of_their_weights(mesh_of):
    """DER++: new rows weigh 1 and those of the second draw beta, however many they are; the first draw is not classified."""
    batch, draw = make_batch(0, (0, 2, 5)), make_draw(1, logits=True)
    rig = Rig(mesh_of(2), make_strategy("der_pp", {"alpha": 0.0, "beta": 0.7}), prior="balanced")
    before, after, _ = learned(rig, batch, draw)
    (x, y), (u, v) = valid_rows(batch, draw)
    arrived = np.bincount(y, minlength=K)
    log_prior = log_of(arrived / arrived.sum() + 0.7 * HELD / HELD.sum())
    grads = jax.grad(lambda p: loss_of(rig, p, [(x, y, 1 / len(y)), (u, v, 0.7 / len(v))], log_prior))(before)
    close(jax.device_get(after.params), jax.tree.map(lambda p, g: p - RATE * g, before, grads))


def test_one_head_a_task_has_the_prior_of_its_classes(mesh_of):
    batch, draw = make_batch(0, (2, 3)), make_draw(1, classes=(0, 1))
    rig = rig_of(mesh_of(2), "er", loss_classes="task")
    before, after, _ = learned(rig, batch, draw)
    (x, y), (u, v) = valid_rows(batch, draw)
    expected = np.bincount(y, minlength=K) + len(v) * HELD / HELD.sum()
    log_prior = log_of(expected)
    head = np.arange(K) // 2
    parts, whole = [(x, y), (u, v)], len(y) + len(v)
    weighed = [(*part, 1 / whole) for part in parts]
    grads = jax.grad(lambda p: loss_of(rig, p, weighed, log_prior, head[:, None] == head[None, :]))(before)
    close(jax.device_get(after.params), jax.tree.map(lambda p, g: p - RATE * g, before, grads))


def test_new_rows_are_counted_from_the_first_step_of_the_task_on(mesh_of):
    rig = rig_of(mesh_of(4), "incremental")
    state, wanted = rig.state(), np.zeros(K, int)
    for t in range(5):
        if t == 3:  # another task
            state = dataclasses.replace(state, task_step=jnp.zeros_like(state.task_step))
            wanted[:] = 0
        batch = make_batch(t, (0, 2, 5) if t < 3 else (1, 3))
        wanted += np.bincount(batch["label"][batch["valid"]], minlength=K)
        state, _ = rig.step(state, rig.rows(batch))
        np.testing.assert_array_equal(state.arrived, wanted)


def test_a_class_that_has_not_come_is_unlearnt_as_by_the_plain_loss(mesh_of):
    """Two classes that are equally likely, four that nobody has seen: the step is that of plain cross-entropy over all six,
    which lowers the logits of the four."""
    batch, draw = make_batch(0, (0, 2)), make_draw(1, classes=(0, 2))
    batch["label"][:] = np.arange(len(batch["label"])) % 2 * 2
    batch["valid"][:] = True
    held = np.array([5, 0, 5, 0, 0, 0], np.int32)
    before, after, _ = learned(rig_of(mesh_of(2), "er"), batch, draw, held=held)
    _, plain, _ = learned(Rig(mesh_of(2), make_strategy("er"), prior="none"), batch, draw, held=held)
    close(*jax.device_get((after.params, plain.params)))
    moved = np.asarray(after.params["head"]["bias"]) - before["head"]["bias"]
    assert (moved[[1, 3, 4, 5]] < -1e-4).all()


def test_a_row_of_a_class_that_was_not_expected_has_a_finite_loss(mesh_of):
    draw = make_draw(1, classes=(4,))  # of a memory that holds none
    held = np.zeros(K, np.int32) + (HELD > 16)
    _, after, metrics = learned(rig_of(mesh_of(2), "er"), make_batch(0, (0, 2)), draw, held=held)
    assert np.isfinite(metrics["loss"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(after.params)))


def test_rows_that_are_equally_likely_already_learn_as_without(mesh_of):
    batch = make_batch(0)
    batch["valid"][:] = True
    batch["label"] = (np.arange(len(batch["label"])) % 2).astype(np.int32)
    found = []
    for prior in ("none", "balanced"):
        rig = Rig(mesh_of(2), make_strategy("incremental"), prior=prior, loss_classes="task")
        found.append(jax.device_get(learned(rig, batch, None)[1].params))
    close(*found)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_with_a_memory_knows_the_prior_or_has_its_own_way(name, mesh_of):
    config = default_config()
    config.strategy, config.loss.prior = name, "balanced"
    strategy = make_strategy(name)
    check_config(config, 1)
    assert prior_of(config, strategy) == ("none" if name in UNCORRECTED else "balanced")
    if name in UNCORRECTED:
        return
    batch, draw = make_batch(0, (0, 2, 5)), make_draw(1, logits=strategy.stores_outputs)
    found = []
    for prior in ("none", "balanced"):
        after = learned(Rig(mesh_of(2), strategy, prior=prior), batch, draw)[1]
        found.append(np.asarray(after.params["head"]["bias"]))
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior": "flat"}, r"loss.prior: 'flat' is not allowed, give one of none, balanced"),
        ({"replay_weight": 0.0}, r"loss.replay_weight: 0.0 is not allowed, give a positive number"),
    ],
)
def test_values_that_are_not_allowed(changes, message):
    config = default_config()
    config.loss.update(changes)
    with pytest.raises(UserError, match=message):
        check_config(config, 1)


@pytest.mark.parametrize("name", ["incremental", "der_pp", "er_ace", "agem", "gdumb"])
def test_a_weight_of_replayed_rows_needs_a_mean_over_all_rows(name):
    config = default_config()
    config.strategy, config.loss.replay_weight = name, 2.0
    with pytest.raises(UserError, match=f"loss.replay_weight: 2.0 is not allowed, give 1: {name} has no mean"):
        check_config(config, 1)


def test_the_prior_needs_rows_in_mixed_order():
    config = default_config()
    config.strategy, config.loss.prior = "wa", "balanced"
    config.buffer.selection.by, config.finetune.epochs, config.finetune.order = "random", 1, "sequential"
    with pytest.raises(UserError, match=r"finetune.order: 'sequential' is not allowed, give shuffled"):
        check_config(config, 1)


def test_a_draw_of_the_rig_is_whole():
    assert make_draw(1).valid.sum() not in (0, DRAWN)  # else the tests above could not tell rows that are not valid
