"""Nearest class means of the memory: against loops over the stored rows, on any number of devices; in whole runs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.data import class_incremental
from jaxcl.errors import Preempted, UserError
from jaxcl.nearest_mean import Means, nearness
from jaxcl.search.seeds import train_seeds
from jaxcl.strategies import make_strategy
from jaxcl.training.build import build
from jaxcl.training.class_means import make_class_means
from jaxcl.training.evaluate import make_evaluate
from jaxcl.training.loop import train_and_evaluate
from tests.rig import K, Rig, make_batch
from tests.unit.test_strategies_end import remember
from tests.whole import assert_same_run, lines, small, stop_at

METRICS = ("nmc", "nmc_top5")
CLASSES = (0, 1, 3, 4)  # those of which the memory has rows


def unit_features(rig, params, image):
    features = rig.model.apply(params, {}, image / np.float32(255), train=False)[0]["features"]
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))


def filled(mesh, memory=None):
    """A rig, its state with rows in the memory, and what these are."""
    rig, batch = Rig(mesh, make_strategy("er"), memory=memory or {}), make_batch(0, CLASSES, n=32)
    return rig, remember(rig, rig.state(), batch), batch


def means_by_hand(rig, params, batch):
    features = unit_features(rig, params, batch["image"])
    sums = {k: features[batch["valid"] & (batch["label"] == k)].mean(0) for k in CLASSES}
    return {k: x / np.linalg.norm(x) for k, x in sums.items()}


@pytest.mark.parametrize("memory", ["sharded", "replicated"])
@pytest.mark.parametrize("devices", [1, 4])
def test_the_means_are_those_of_the_stored_rows(devices, memory, mesh_of):
    rig, state, batch = filled(mesh_of(devices), {"memory": memory})
    found = make_class_means(rig.bound)(state.weights, state.buffer)
    expected = means_by_hand(rig, state.params, batch)
    assert np.flatnonzero(found.known).tolist() == sorted(CLASSES)
    for k, mean in expected.items():
        np.testing.assert_allclose(found.mean[k], mean, rtol=1e-4, atol=1e-5)
    assert (np.asarray(found.mean)[~np.asarray(found.known)] == 0).all()


def test_several_seeds_have_means_of_their_own(mesh_of):
    rig, state, batch = filled(mesh_of(4))
    each = [rig.new_weights(jax.random.key(seed))[0] for seed in (1, 2)]
    params = jax.tree.map(lambda *x: jnp.stack(x), *each)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (state.weights._replace(params=state.params), state.buffer))
    found = make_class_means(rig.bound, seeds=True)(twice[0]._replace(params=params), twice[1])
    for i, one in enumerate(each):
        for k, mean in means_by_hand(rig, one, batch).items():
            np.testing.assert_allclose(found.mean[i, k], mean, rtol=1e-4, atol=1e-5)


def test_a_row_belongs_to_the_nearest_mean_and_never_to_a_class_without_rows():
    rng = np.random.default_rng(0)
    mean, query = rng.normal(size=(K, 5)), rng.normal(size=(40, 5)).astype(np.float32)
    mean = np.float32(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    known = np.isin(np.arange(K), CLASSES)
    unit = query / np.linalg.norm(query, axis=1, keepdims=True)
    distance = np.where(known, np.linalg.norm(unit[:, None] - mean[None], axis=2), np.inf)
    found = nearness(Means(mean, known), query)
    np.testing.assert_array_equal(np.argsort(-np.asarray(found), axis=1)[:, :4], np.argsort(distance, axis=1)[:, :4])


@pytest.mark.parametrize("devices", [1, 4])
def test_the_metrics_count_the_test_rows_of_each_task(devices, mesh_of):
    rig, state, batch = filled(mesh_of(devices))
    rows = make_batch(3, n=32) | {"valid": np.ones(32, bool)}
    scenario = class_incremental(rows["label"], rows["label"], K, 3)
    bound = dataclasses.replace(rig.bound, classes=scenario.class_table)
    evaluate = make_evaluate(bound, scenario.task_of_test_row, metrics=METRICS)
    found = evaluate(state.weights, [rows], make_class_means(rig.bound)(state.weights, state.buffer))
    means, features = means_by_hand(rig, state.params, batch), unit_features(rig, state.params, rows["image"])
    distance = np.stack(
        [np.linalg.norm(features - means[k], axis=1) if k in means else np.full(32, 9) for k in range(K)], 1
    )
    own = distance[np.arange(32), rows["label"]][:, None]
    rank = (distance <= own).sum(1)  # ties, as between classes without a mean, count against the row
    for name, k in (("nmc", 1), ("nmc_top5", 5)):
        expected = [(rank <= k)[task.test].mean() for task in scenario.tasks]
        np.testing.assert_allclose(found[name], expected, err_msg=name)
    assert 0 < found["nmc"].mean() < found["nmc_top5"].mean()


# --- whole runs -------------------------------------------------------------------------------------------------------


def config_of(**changes):
    return small(strategy="er", data__tasks=2, eval__metrics=METRICS, **changes)


def test_a_run_tells_them_stopped_or_not_on_any_devices(tmp_path, monkeypatch):
    config = config_of(optimizer__average=0.9)
    result = train_and_evaluate(config, tmp_path / "whole", devices=jax.devices()[:2], progress=False)
    assert [line["nmc"] for line in lines(tmp_path / "whole", "evaluation")] == result["nmc_matrix"]
    assert np.shape(result["nmc_matrix"]) == (2, 2)
    assert result["average_nmc"] == np.mean(result["nmc_matrix"][-1]) > 0.3
    assert result["average_nmc_top5"] == np.mean(result["nmc_top5_matrix"][-1]) > result["average_nmc"]
    plain = train_and_evaluate(
        small(strategy="er", data__tasks=2, optimizer__average=0.9),
        tmp_path / "plain",
        devices=jax.devices()[:2],
        progress=False,
    )
    for name in ("accuracy_matrix", "forward_transfer", "steps", "buffer"):  # nothing else is touched
        assert result[name] == plain[name]
    stop_at(monkeypatch, [30])
    with pytest.raises(Preempted):
        train_and_evaluate(config, tmp_path / "stopped", devices=jax.devices()[:2], progress=False)
    train_and_evaluate(config, tmp_path / "stopped", devices=jax.devices()[:2], progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    (tmp_path / "whole" / "result.json").unlink()  # all tasks are done: the last evaluation is made from the checkpoint
    again = train_and_evaluate(config, tmp_path / "whole", devices=jax.devices()[:2], progress=False)
    for name in ("nmc_matrix", "average_nmc", "accuracy_matrix", "confusion", "accuracy_in_task"):
        assert again[name] == result[name]


def test_seeds_together_have_their_own(tmp_path):
    config, where = config_of(optimizer__average=0.9), {seed: tmp_path / str(seed) for seed in (3, 5)}
    train_seeds(config, where, devices=jax.devices()[:2], progress=False)
    found = [json.loads((folder / "result.json").read_text())["nmc_matrix"] for folder in where.values()]
    config.seed = 5
    alone = train_and_evaluate(config, tmp_path / "alone", devices=jax.devices()[:2], progress=False)
    np.testing.assert_allclose(found[1], alone["nmc_matrix"], atol=0.01)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"strategy": "incremental"},
            "eval.metrics: 'nmc' is not allowed, give one that needs no memory: incremental has",
        ),
        (
            {"buffer__tier": "host"},
            "eval.metrics: 'nmc' is not allowed, give one that needs no memory on the devices, or",
        ),
    ],
)
def test_without_a_memory_on_the_devices_it_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        build(small(eval__metrics=("nmc",), **changes), jax.devices()[:1])


def test_a_strategy_that_reads_a_head_wants_one():
    for name in ("uer", "wa", "icarl", "bic"):
        config = small(strategy=name, model__name="dytox")
        with config.unlocked():
            config.model.options = {"width": 8, "depth": 1, "heads": 4, "patch": 4}
        with pytest.raises(UserError, match=f"strategy: {name} reads the weights of a linear head .* dytox has not"):
            build(config, jax.devices()[:1])
