"""What strategies do at a task's end, against loops over all rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows
from jaxcl.data import make_normalize
from jaxcl.strategies import make_strategy
from jaxcl.strategies.bic import is_held_out
from jaxcl.strategies.wa import align
from jaxcl.training.end_task import make_end_task
from tests.rig import SHAPE, K, Rig, close, make_batch, make_draw
from tests.unit.test_strategies import OLD, SCALE, SEEN, SHIFT, only_valid, own_state


def end_of_task(rig: Rig, state, batches=()):
    return make_end_task(rig.bound)(state, lambda: batches)


def remember(rig: Rig, state, batch):
    """The state with the batch's valid rows in the buffer, which has room for them all."""
    rows = Rows({"image": batch["image"]}, batch["label"], batch["id"], batch["valid"])
    buffer = jax.jit(rig.buffer.insert)(state.buffer, mesh_lib.shard_rows(rig.mesh, rows), jax.random.key(0))
    return dataclasses.replace(state, buffer=buffer)


@pytest.mark.parametrize(("devices", "loss_classes"), [(1, "all"), (4, "all"), (4, "seen"), (4, "task")])
def test_the_fisher_information_is_that_of_a_loop_over_rows(devices, loss_classes, mesh_of):
    """In the second of three tasks, whose rows are of classes 2 and 3 (and of all, where all take part)."""
    rig = Rig(mesh_of(devices), make_strategy("ewc"), loss_classes=loss_classes)
    classes = tuple(range(K)) if loss_classes == "all" else (2, 3)
    counted = {"all": np.arange(K) >= 0, "seen": SEEN, "task": SEEN & ~OLD}[loss_classes]
    state, batches = rig.state(task=np.int32(1)), [make_batch(0, classes), make_batch(1, classes)]
    params = jax.device_get(state.params)
    total, rows = jax.tree.map(np.zeros_like, params), 0

    def likelihood(params, image, label):
        logits = rig.model.apply(params, {}, image / np.float32(255), train=False)[0]["logits"]
        return logits[0, label] - jnp.log(jnp.sum(jnp.exp(logits[0]), where=counted))

    for batch in batches:
        for i in np.flatnonzero(batch["valid"]):
            value, grads = jax.value_and_grad(likelihood)(params, batch["image"][i : i + 1], batch["label"][i])
            total = jax.tree.map(lambda s, g, p=value: s + jnp.exp(p) * g**2, total, grads)
            rows += 1
    ended = end_of_task(rig, state, batches)
    fisher = jax.tree.map(lambda s: s / rows, total)
    close(ended.strategy_state["fisher"], fisher, rtol=1e-4)
    close(ended.strategy_state["pulled"], jax.tree.map(np.multiply, fisher, params), rtol=1e-4)


@pytest.mark.parametrize("online", [True, False])
def test_ewc_over_two_tasks(online, mesh_of):
    """The pull at weights w after tasks that ended at v1 and v2, against the sum of the penalties' gradients."""
    rig = Rig(mesh_of(2), make_strategy("ewc", {"online": online, "gamma": 0.5, "strength": 1.0}))
    fishers, weights = [], []
    state = rig.state()
    for task in (0, 1):
        weights.append(jax.device_get(rig.new_weights(jax.random.key(task))[0]))
        single = end_of_task(rig, rig.state(params=weights[-1]), [make_batch(task)])
        fishers.append(jax.device_get(single.strategy_state["fisher"]))
        state = end_of_task(
            rig, dataclasses.replace(state, params=rig.state(params=weights[-1]).params), [make_batch(task)]
        )
    own = state.strategy_state
    w = jax.device_get(rig.new_weights(jax.random.key(7))[0])
    found = jax.tree.map(lambda w, f, p: f * w - p, w, own["fisher"], own["pulled"])

    def expected(w, f1, f2, v1, v2):
        return (0.5 * f1 + f2) * (w - v2) if online else f1 * (w - v1) + f2 * (w - v2)

    close(found, jax.tree.map(expected, w, *fishers, *weights), rtol=1e-4)


@pytest.mark.parametrize("devices", [1, 4])
def test_icarl_classifies_by_the_nearest_mean_of_what_is_stored(devices, mesh_of):
    rig = Rig(mesh_of(devices), make_strategy("icarl"))
    batch = make_batch(0, (0, 1, 3))
    state = remember(rig, rig.state(), batch)
    ended = end_of_task(rig, state)
    own = jax.device_get(ended.strategy_state)
    valid = batch["valid"]  # the buffer has room for all of them
    features = rig.model.apply(ended.params, {}, batch["image"] / np.float32(255), train=False)[0]["features"]
    features = np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))
    means = {k: features[valid & (batch["label"] == k)].mean(0) for k in np.unique(batch["label"][valid])}
    assert own["known"].tolist() == [k in means for k in range(K)]
    query = np.random.default_rng(0).random((20, features.shape[1])).astype(np.float32)
    scores = rig.strategy.scores({"features": jnp.asarray(query), "logits": jnp.zeros((20, K))}, own)
    unit = query / np.linalg.norm(query, axis=1, keepdims=True)
    for row, q in zip(np.asarray(scores), unit, strict=True):
        nearest = min(means, key=lambda k: np.linalg.norm(q - means[k] / np.linalg.norm(means[k])))
        assert row.argmax() == nearest


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_bic_finds_the_best_correction_of_the_held_out_rows(devices, mesh_of):
    """Against SciPy's minimum of the balanced CE over the held-out rows, in task 1; without old classes, none."""
    rig = Rig(mesh_of(devices), make_strategy("bic", {"held_out": 0.6}))
    normalize, batch = make_normalize(SHAPE), make_batch(2, (0, 1, 2, 3), n=32)
    params = jax.tree.map(lambda w: 3 * w, jax.device_get(rig.new_weights(jax.random.key(5))[0]))
    state = rig.state(params=params, task=np.int32(1), strategy_state=own_state("bic", rig))
    state = remember(rig, state, batch)
    ended = end_of_task(rig, state).strategy_state
    rows = only_valid(batch)
    counted = np.asarray(is_held_out(rows.id, 0.6))
    label = rows.label[counted]
    assert len(set(label)) > 2 and 0 < counted.sum() < len(counted)
    logits = np.asarray(rig.model.apply(params, {}, normalize(rows.record["image"]), train=False)[0]["logits"])[counted]

    def loss(theta):
        corrected = np.where(SEEN & ~OLD, theta[0] * logits + theta[1], SCALE * logits + SHIFT)[:, :4].astype(
            np.float64
        )
        each = np.log(np.exp(corrected).sum(1)) - corrected[np.arange(len(label)), label]
        balanced = np.mean([each[label == k].mean() for k in set(label)])
        return balanced + np.sum((theta - [1, 0]) ** 2) / 2 / len(label)  # the prior weighs as much as one row

    best = optimize.minimize(loss, [1.0, 0.0], tol=1e-10)
    for name, before, fitted in (("scale", SCALE, best.x[0]), ("shift", SHIFT, best.x[1])):
        np.testing.assert_allclose(ended[name], np.where(SEEN & ~OLD, fitted, before), atol=2e-3)
    begin = rig.state()
    first = end_of_task(rig, dataclasses.replace(begin, buffer=state.buffer)).strategy_state
    assert (first["scale"] == 1).all() and (first["shift"] == 0).all()
    np.testing.assert_allclose(
        rig.strategy.scores({"logits": jnp.ones((1, K))}, ended)[0], ended["scale"] + ended["shift"], rtol=1e-6
    )


def test_bic_holds_out_the_share_asked_for_of_any_run_of_ids():
    for begin in (0, 12345, 10**9):
        held = np.asarray(is_held_out(jnp.arange(begin, begin + 1000), 0.1))
        assert abs(held.sum() - 100) <= 2


def test_wa_gives_new_classes_the_norm_of_the_old():
    kernel = np.random.default_rng(0).normal(size=(5, K)).astype(np.float32)
    kernel[:, 2:4] *= 3
    new = SEEN & ~OLD
    norm = np.linalg.norm(align(kernel, OLD, new), axis=0)
    assert norm[new].mean() == pytest.approx(norm[OLD].mean(), rel=1e-5)
    np.testing.assert_array_equal(np.asarray(align(kernel, OLD, new))[:, ~new], kernel[:, ~new])
    np.testing.assert_array_equal(align(kernel, np.zeros(K, bool), OLD), kernel)  # the first task


@pytest.mark.parametrize("name", ["lwf", "l2", "wa"])
def test_the_next_step_may_donate_what_a_task_end_left(name, mesh_of):
    rig = Rig(mesh_of(2), make_strategy(name))
    state = end_of_task(rig, rig.state(stored=False))
    pointers = [
        leaf.unsafe_buffer_pointer() for x in jax.tree.leaves(state) for leaf in (s.data for s in x.addressable_shards)
    ]
    assert len(pointers) == len(set(pointers))
    rig.step(rig.stage(state, [make_draw(1)] * rig.strategy.draws), rig.rows(make_batch(0)))
