"""Prototypes and closed forms: against loops over all rows, on any number of devices, in any order of rows and tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.strategies import make_strategy
from jaxcl.strategies.bic import is_held_out
from jaxcl.strategies.ranpac import HELD, RIDGES
from jaxcl.strategies.slca import JITTER, aligned, moments, task_norm
from jaxcl.training.build import build
from jaxcl.training.loop import train_and_evaluate
from tests.rig import CLASSES, K, Rig, close, make_batch
from tests.unit.test_bad_input import said
from tests.unit.test_strategies_end import end_of_task
from tests.whole import last, small

NAMES = {"simplecil": {}, "ranpac": {"dim": 40}, "slca": {"epochs": 2, "draws": 8}}


def rows_of(task, n=32):
    """Rows of the task's two classes, with ids of their own."""
    batch = make_batch(task, (2 * task, 2 * task + 1), n)
    return batch | {"id": np.arange(100 * task, 100 * task + n, dtype=np.int32)}


def ended(rig, order=(0, 1, 2), parts=1, shuffled=None):
    """The state after these tasks, each of so many batches, whose rows may be in another order."""
    state = rig.state()
    for number, task in enumerate(order):
        rows = rows_of(task)
        if shuffled is not None:
            way = np.random.default_rng(shuffled).permutation(32)
            rows = {name: x[way] for name, x in rows.items()}
        batches = [{name: x[i::parts] for name, x in rows.items()} for i in range(parts)]
        state = end_of_task(rig, jax.tree.map(jnp.copy, state), batches)
        state = type(state)(**vars(state) | {"task": state.task + 1 if number < 2 else state.task})
    return state


def features_of(rig, task):
    rows = rows_of(task)
    outputs = rig.model.apply(jax.device_get(rig.state().params), {}, rows["image"] / np.float32(255), train=False)[0]
    keep = rows["valid"]
    return np.asarray(outputs["features"], np.float64)[keep], rows["label"][keep], rows["id"][keep]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_on_one_and_on_eight_devices(name, mesh_of):
    found = [jax.device_get(ended(Rig(mesh_of(n), make_strategy(name, NAMES[name])))) for n in (1, 8)]
    one, eight = ((x.strategy_state, x.params["head"]) for x in found)
    # What a ridge solution or a Cholesky factor does to the last bits is told by its scale.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(a).max()))),
        one,
        eight,
    )


@pytest.mark.parametrize("name", ["simplecil", "ranpac"])
def test_the_order_of_rows_and_tasks_does_not_matter(name, mesh_of):
    rig = Rig(mesh_of(2), make_strategy(name, NAMES[name]))
    expected = jax.device_get(ended(rig).strategy_state)
    for how in ({"order": (2, 0, 1)}, {"parts": 2}, {"shuffled": 5}):
        found = jax.device_get(ended(rig, **how).strategy_state)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(a).max()))),
            found,
            expected,
        )


def test_simplecil_ranks_by_the_cosine_with_the_class_means(mesh_of):
    rig = Rig(mesh_of(4), make_strategy("simplecil"))
    state = rig.state()
    for task in (0, 1):  # of three: two classes have had no rows
        state = end_of_task(rig, jax.tree.map(jnp.copy, state), [rows_of(task)])
    features, labels, _ = (np.concatenate(x) for x in zip(*(features_of(rig, task) for task in (0, 1)), strict=True))
    query = np.random.default_rng(0).normal(size=(9, features.shape[1])).astype(np.float32)
    found = np.asarray(rig.strategy.scores({"features": query}, state.strategy_state))
    for k in range(4):
        mean = features[labels == k].mean(0)
        cosine = query @ mean / np.linalg.norm(query, axis=1) / np.linalg.norm(mean)
        np.testing.assert_allclose(found[:, k], cosine, atol=1e-5)
    assert (found[:, 4:] == -2).all()


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_ranpac_is_ridge_regression_on_random_features(ridge, mesh_of):
    rig = Rig(mesh_of(4), make_strategy("ranpac", {"dim": 40, "ridge": ridge}))
    state = jax.device_get(ended(rig).strategy_state)
    features, labels, ids = (
        np.concatenate(x) for x in zip(*(features_of(rig, task) for task in range(3)), strict=True)
    )
    h = np.maximum(features @ state["projection"].astype(np.float64), 0)
    y, held = np.eye(K)[labels], np.asarray(is_held_out(jnp.asarray(ids), HELD))
    assert 0 < held.sum() < len(held) / 2

    def solved(h, y, ridge):
        gram = h.T @ h
        return np.linalg.solve(gram + ridge * np.trace(gram) / 40 * np.eye(40), h.T @ y)

    if not ridge:
        errors = [np.sum((h[held] @ solved(h[~held], y[~held], x) - y[held]) ** 2) for x in RIDGES]
        ridge = RIDGES[int(np.argmin(errors))]
        assert RIDGES[0] < ridge or min(errors) < errors[-1]
    answers = rig.strategy.scores({"features": features.astype(np.float32)}, state)
    np.testing.assert_allclose(answers, h @ solved(h, y, ridge), atol=2e-3)


def test_slca_takes_the_moments_of_each_class(mesh_of):
    rig = Rig(mesh_of(4), make_strategy("slca", {"epochs": 0}))
    sums = jax.device_get(ended(rig).strategy_state)
    mean, factor = moments(sums)
    for task in range(3):
        features, labels, _ = features_of(rig, task)
        for k in (2 * task, 2 * task + 1):
            mine = features[labels == k]
            np.testing.assert_allclose(mean[k], mine.mean(0), atol=1e-5)
            np.testing.assert_allclose(
                factor[k] @ factor[k].T, np.cov(mine.T) + JITTER * np.eye(mine.shape[1]), atol=1e-4
            )
    rig = Rig(mesh_of(4), make_strategy("slca", {"epochs": 0, "covariance": "diagonal"}))
    found = moments(jax.device_get(ended(rig).strategy_state))
    np.testing.assert_allclose(found[0], mean, atol=1e-6)
    np.testing.assert_allclose(
        found[1] ** 2, np.diagonal(factor @ factor.transpose(0, 2, 1), axis1=1, axis2=2), atol=1e-4
    )


def test_slca_aligns_the_head_of_the_classes_seen(mesh_of):
    """Far apart Gaussians: the head, however it begins, tells them apart; that of classes not seen only decays."""
    rig = Rig(mesh_of(1), make_strategy("slca"))
    context = rig.bound.context({}, jnp.int32(1))  # the second of three tasks: classes 0 to 3
    rng = np.random.default_rng(0)
    mean = jnp.asarray(rng.normal(size=(K, 12)) * 3, jnp.float32)
    head = {"kernel": jnp.asarray(rng.normal(size=(12, K)), jnp.float32), "bias": jnp.zeros(K)}
    options = {"epochs": 5, "rate": 0.1, "draws": 64, "temperature": 0.1}
    found = aligned(head, mean, jnp.full((K, 12), 0.1), context, jax.random.key(0), **options)
    logits = mean @ found["kernel"] + found["bias"]
    assert (np.argmax(np.asarray(logits)[:4, :4], axis=1) == np.arange(4)).all()
    ratio = np.asarray(found["kernel"][:, 4:] / head["kernel"][:, 4:])
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)
    assert 0.9 < ratio[0, 0] < 1


def test_slca_norm_of_logits_is_the_mean_over_tasks_so_far(mesh_of):
    context = Rig(mesh_of(1), make_strategy("slca")).bound.context({}, jnp.int32(1))
    logits = np.random.default_rng(0).normal(size=(5, K)).astype(np.float32)
    expected = np.mean([np.linalg.norm(logits[:, CLASSES[task]], axis=1) for task in (0, 1)], axis=0)
    np.testing.assert_allclose(task_norm(logits, context), expected, rtol=1e-5)
    grads = jax.grad(lambda x: jnp.sum(task_norm(x, context)))(jnp.zeros((2, K)))
    assert np.isfinite(grads).all()


def test_slca_learns_among_the_present_classes_and_aligns_from_the_second_task_on(mesh_of):
    rig = Rig(mesh_of(2), make_strategy("slca", NAMES["slca"]))
    state = rig.state(task=np.int32(1))
    before = jax.device_get(state.params)
    batch = make_batch(0, (2, 3))
    after, metrics = rig.step(state, rig.rows(batch))
    logits = np.asarray(rig.model.apply(before, {}, batch["image"] / np.float32(255), train=False)[0]["logits"])
    mine = logits[batch["valid"]][:, 2:4]
    each = np.log(np.exp(mine).sum(1)) - mine[np.arange(len(mine)), batch["label"][batch["valid"]] - 2]
    np.testing.assert_allclose(metrics["loss"], each.mean(), rtol=1e-5)
    moved = np.abs(np.asarray(after.params["head"]["kernel"]) - before["head"]["kernel"]).max(0) > 0
    np.testing.assert_array_equal(moved, np.isin(np.arange(K), (2, 3)))
    first = end_of_task(rig, rig.state(), [rows_of(0)])
    close(jax.device_get(first.params), before)


@pytest.mark.parametrize(
    "name, adapt",
    [
        ("simplecil", False),
        ("ranpac", True),
        pytest.param("simplecil", True, marks=pytest.mark.exhaustive),
        pytest.param("ranpac", False, marks=pytest.mark.exhaustive),
    ],
)
def test_weights_stay_but_in_the_first_task_of_one_that_adapts(name, adapt, tmp_path):
    config = small(strategy=name, epochs=2, **{f"strategies__{name}__adapt": adapt})
    found = {}
    for devices in (1, 4):
        folder = tmp_path / str(devices)
        result = train_and_evaluate(config, folder, devices=jax.devices()[:devices], progress=False)
        found[devices] = np.array(result["accuracy_matrix"])
    np.testing.assert_allclose(found[1], found[4], atol=0.02)
    assert result["average_accuracy"] > 0.3 and result["buffer"] is None  # of features that nobody trained
    parts = {name: x for name, x in last(folder)[1].items() if name.startswith("params.")}
    new = build(config, jax.devices()[:1]).new_weights(jax.random.fold_in(jax.random.key(config.seed), 0))[0]
    same = np.array_equal(parts["params.Dense_0.kernel"], new["Dense_0"]["kernel"])
    assert same != adapt


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategies__ranpac__dim": 0}, "strategies.ranpac.dim: 0 is not allowed, give a whole number from 1"),
        ({"strategies__ranpac__ridge": -1.0}, "strategies.ranpac.ridge: -1.0 is not allowed, give 0 or more"),
        ({"strategies__slca__rate": 0.0}, "strategies.slca.rate: 0.0 is not allowed, give a positive number"),
        (
            {"strategies__slca__covariance": "x"},
            "strategies.slca.covariance: 'x' is not allowed, give one of full, diag",
        ),
    ],
)
def test_bad_options_cost_one_line(changes, words, tmp_path):
    name = next(iter(changes)).split("__")[1]
    assert said("training", tmp_path / "run", strategy=name, **changes).startswith(words)
    with pytest.raises(UserError, match=f"^strategies.{name}"):
        make_strategy(name, {next(iter(changes)).split("__")[2]: next(iter(changes.values()))})
