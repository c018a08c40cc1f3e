"""A memory of activations above a part that learns: the network that rows enter at two places, steps of it, and whole runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import latent
from jaxcl.data import open_source
from jaxcl.latent import LATENT, Latent, joined
from jaxcl.models import RowFacts, joining, make_model, split
from jaxcl.strategies import make_strategy
from jaxcl.training.latents import Codec
from jaxcl.training.loop import train_and_evaluate
from jaxcl.training.trained import load
from tests.rig import DRAWN, RATE, SHAPE, K, Rig, close, make_batch, make_draw
from tests.unit.test_bad_input import said
from tests.whole import assert_same_run, last, small, stop_at

# --- the network -------------------------------------------------------------------------------------------------------


def given(name, options, layer):
    model = make_model(name, 3, options=options)
    variables = model.init(jax.random.key(0), (8, 8, 3))
    whole, halves = joining(model, layer, (8, 8, 3))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(6, 8, 8, 3)).astype(np.float32)
    latents = np.abs(rng.normal(size=(4, *halves.shape))).astype(np.float32)
    return model, whole, halves, (variables["params"], variables["batch_stats"]), images, latents


def test_rows_join_at_the_layer_and_the_part_below_learns_from_images_alone():
    model, whole, halves, (params, stats), images, latents = given("mlp", {"hidden": (5, 4)}, "Dense_0")
    assert set(halves.below) == {"Dense_0"}
    label = np.arange(10) % 3

    def plain(params):
        z = images.reshape(6, -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
        x = jax.nn.relu(jnp.concatenate([z, latents]))
        x = jax.nn.relu(x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"])
        return x @ params["head"]["kernel"] + params["head"]["bias"], z

    def loss(apply, params):
        logits = apply(params)
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(10), label])

    def mine(params):
        rows = joined([images, Latent(jnp.asarray(latents))])
        return whole.apply(params, stats, rows, train=True, mask=np.ones(10, bool))[0]["logits"]

    close(mine(params), plain(params)[0], atol=1e-5)
    grads = [jax.grad(functools.partial(loss, f))(params) for f in (mine, lambda params: plain(params)[0])]
    close(*grads, atol=1e-5)
    outputs, _ = whole.apply(params, stats, images, train=False)
    close(outputs[LATENT], plain(params)[1], atol=1e-5)
    close(outputs["logits"], model.apply(params, stats, images, train=False)[0]["logits"], atol=1e-5)
    above = whole.apply(params, stats, Latent(jnp.asarray(latents)), train=False)[0]["logits"]
    close(above, plain(params)[0][6:], atol=1e-5)
    silent = jax.grad(lambda params: whole.apply(params, stats, images, train=True)[0][LATENT].sum())(params)
    assert all((x == 0).all() for x in jax.tree.leaves(silent))  # what is remembered has no gradient


@pytest.mark.parametrize("norm", ["sync", "ada"])
def test_norms_below_have_the_statistics_of_images_and_those_above_of_all_rows(norm):
    layer, options = "MaskedBatchNorm_1" if norm == "sync" else "Conv_1", {"width": 2, "norm": norm}
    model, whole, halves, (params, stats), images, latents = given("convnet", options, layer)
    mask = np.array([1, 1, 0, 1, 1, 1, 1, 0, 1, 1], bool)
    images[2] = latents[1] = np.nan  # rows that are not valid hold anything
    if norm == "ada":
        zeros = np.zeros(10, np.int32)
        mask = RowFacts(mask, zeros, mask & False, zeros, zeros, jnp.int32(0), 6)
    found, new = whole.apply(params, stats, joined([images, Latent(jnp.asarray(latents))]), train=True, mask=mask)
    valid = mask if norm == "sync" else mask.valid
    few = valid[:6] if norm == "sync" else jax.tree.map(lambda x: x[:6] if np.ndim(x) else x, mask)
    _, alone = model.apply(params, stats, images, train=True, mask=few)
    for name in halves.below:
        if name in stats:
            close(new[name], alone[name])
    assert np.isfinite(found["logits"][valid]).all()
    z = jnp.concatenate([jnp.nan_to_num(found[LATENT][:6]), jnp.nan_to_num(latents)])
    same, above = split(model, layer, (8, 8, 3)).upper.apply(params, stats, z, train=True, mask=mask)
    close(found["logits"][valid], same["logits"][valid], atol=1e-4)
    moved = [name for name in stats if name not in halves.below]
    assert moved
    for name in moved:
        close(new[name], above[name], atol=1e-5)


# --- steps -------------------------------------------------------------------------------------------------------------

CODEC = Codec((12,), "int8")
SCALES = {"Dense_0": 0.1}
OPTIONS = {"der_pp": {"alpha": 0.7, "beta": 0.4}, "mir": {"replayed": 3}}


@functools.cache
def rig_of(mesh, name):
    return Rig(mesh, make_strategy(name, OPTIONS.get(name)), layer="Dense_0", codec=CODEC, scales=SCALES)


def remembered(seed):
    """A draw of activations, as the memory holds them, and what they stand for."""
    draw = make_draw(seed, logits=True, classes=(0, 1, 2, 3))
    x = np.random.default_rng(seed).normal(size=(DRAWN, 12)).astype(np.float32)
    bytes_ = np.asarray(CODEC.stored(x))
    return dataclasses.replace(draw, record={**draw.record, "image": bytes_}), np.asarray(CODEC.plain(bytes_))


def waiting(rig, stored=False):
    found = [remembered(10 + i) for i in range(rig.strategy.draws)]
    draws, latents = zip(*found, strict=True)
    return rig.stage(rig.state(stored=stored, task=np.int32(1)), list(draws)), draws, latents


def logits_of(params, batch, latents):
    x = batch["image"].reshape(len(batch["label"]), -1) / np.float32(255)
    z = jnp.concatenate([x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], *latents])
    return jax.nn.relu(z) @ params["head"]["kernel"] + params["head"]["bias"]


def entropy(logits, label):
    return jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(len(label)), label]


def test_a_step_follows_the_formula_and_remembers_what_the_weights_made(mesh_of):
    rig, batch = rig_of(mesh_of(4), "der_pp"), make_batch(0, (2, 3))
    state, (first, second), latents = waiting(rig, stored=True)
    before, new = jax.device_get(state.params), batch["valid"]

    def loss(params):
        logits = logits_of(params, batch, latents)
        one, two, three = jnp.split(logits, [16, 16 + DRAWN])
        value = entropy(one, batch["label"])[new].mean()
        value += 0.7 * ((two - first.record["logits"])[first.valid] ** 2).mean()
        return value + 0.4 * entropy(three, second.label)[second.valid].mean()

    grads = jax.grad(loss)(before)
    logits = logits_of(before, batch, [])
    after, _ = rig.step(state, rig.rows(batch))
    grads["Dense_0"] = jax.tree.map(lambda g: 0.1 * g, grads["Dense_0"])
    expected = jax.tree.map(lambda w, g: w - RATE * g, before, grads)
    close(after.params, expected, atol=1e-5)

    shard = jax.device_get(after.buffer)
    held = np.flatnonzero(shard.id >= 0)
    assert len(held) > 4 and set(shard.id[held]) <= set(batch["id"][new])
    x = batch["image"].reshape(16, -1)[shard.id[held]] / np.float32(255)
    z = x @ before["Dense_0"]["kernel"] + before["Dense_0"]["bias"]
    stored = np.asarray(latent.decode(shard.record["image"][held, 0, 0], (12,), "int8"))
    assert (np.abs(stored - z) <= np.abs(z).max(1, keepdims=True) / 127 * 0.51 + 1e-5).all()
    np.testing.assert_allclose(shard.record["logits"][held], logits[shard.id[held]], atol=1e-5)


@pytest.mark.parametrize("name", ["der_pp", "mir"])
def test_any_number_of_devices_takes_the_same_step(name, mesh_of):
    def step(devices):
        rig = rig_of(mesh_of(devices), name)
        state, metrics = rig.step(waiting(rig)[0], rig.rows(make_batch(0, (2, 3))))
        return jax.device_get((state.params, metrics))

    close(step(4), step(1), atol=1e-5)


def test_synchronised_norms_on_any_number_of_devices_and_no_sum_twice(mesh_of):
    """Statistics of new rows below, of all rows above; the half that is not used sums nothing over the devices."""
    found, counts = [], {}
    model = make_model("convnet", K, options={"width": 2, "norm": "sync"})
    codec = Codec(split(model, "MaskedBatchNorm_1", SHAPE).shape, "float32")
    scales = dict.fromkeys(split(model, "MaskedBatchNorm_1", SHAPE).below, 0.5)
    x = np.random.default_rng(0).normal(size=(DRAWN, *codec.shape)).astype(np.float32)
    for devices in (1, 4):
        own = {"layer": "MaskedBatchNorm_1", "codec": codec, "scales": scales}
        rig = Rig(mesh_of(devices), make_strategy("er"), "convnet", **own)
        draw = make_draw(1)
        draw.record["image"] = np.asarray(codec.stored(x))
        state = rig.stage(rig.state(stored=False), [draw])
        batch = rig.rows(make_batch(0))
        counts[devices] = rig.step.lower(state, batch).compile().as_text().count(" all-reduce(")
        state, metrics = rig.step(state, batch)
        found.append(jax.device_get((state.params, state.batch_stats, metrics)))
    close(*found, atol=2e-5)
    plain = Rig(mesh_of(4), make_strategy("er"), "convnet")
    state = plain.stage(plain.state(stored=False), [make_draw(1)])
    assert counts[4] == plain.step.lower(state, plain.rows(make_batch(0))).compile().as_text().count(" all-reduce(")


# --- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run whose weights others begin with."""
    folder = tmp_path_factory.mktemp("first") / "run"
    train_and_evaluate(small(strategy="joint", epochs=4), folder, devices=jax.devices()[:1], progress=False)
    return folder


def run(pretrained, folder, devices=2, **changes):
    more = {"model__init_from": str(pretrained), "latent__layer": "Dense_0", "latent__below": "slow", "strategy": "er"}
    more |= {"optimizer__scales": {"Dense_0": 0.1}}
    return train_and_evaluate(small(**more | changes), folder, devices=jax.devices()[:devices], progress=False)


def test_with_the_rate_0_it_is_the_run_on_images_with_what_lies_below_frozen(pretrained, tmp_path):
    """In float32, where storing changes nothing."""
    run(pretrained, tmp_path / "slow", latent__dtype="float32", optimizer__scales={"Dense_0": 0.0})
    images = {"latent__layer": None, "latent__below": "frozen", "optimizer__scales": {}, "freeze": ("Dense_0",)}
    run(pretrained, tmp_path / "images", **images)
    a, b = (last(tmp_path / name)[1] for name in ("slow", "images"))
    for name in a:
        if name.startswith("params."):
            np.testing.assert_allclose(a[name], b[name], atol=2e-3, err_msg=name)
    np.testing.assert_array_equal(a["buffer.id"], b["buffer.id"])


def test_a_stopped_run_ends_as_the_whole_and_its_rows_age(pretrained, tmp_path, monkeypatch):
    changes = {"latent__dtype": "int8", "data__augment": ("crop",), "strategy": "der_pp"}
    found = run(pretrained, tmp_path / "whole", **changes)
    assert found["average_accuracy"] > 0.3
    said = {"layer": "Dense_0", "dtype": "int8", "shape": [16], "bytes_per_row": 20, "slow": {"Dense_0": 0.1}}
    assert found["latent"] == said
    stop_at(monkeypatch, [30])
    with pytest.raises(Exception, match="saved at step"):
        run(pretrained, tmp_path / "stopped", **changes)
    monkeypatch.undo()
    run(pretrained, tmp_path / "stopped", **changes)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    arrays, first = last(tmp_path / "whole")[1], last(pretrained)[1]
    assert arrays["buffer.record.image"].shape == (40, 1, 1, 20) and arrays["buffer.record.image"].dtype == np.uint8
    moved = [
        np.abs(arrays[f"params.{name}.kernel"] - first[f"params.{name}.kernel"]).mean()
        for name in ("Dense_0", "Dense_1")
    ]
    assert 0 < 2 * moved[0] < moved[1]

    model = load(tmp_path / "whole", devices=jax.devices()[:1])
    source = open_source("digits")[1]
    answers = model.predict(source.read(np.arange(len(source)))).argmax(1)
    matrix = np.trace(np.array(found["confusion"])) / len(source)
    assert np.mean(answers == source.labels) == pytest.approx(matrix, abs=1e-6)  # from images, nothing rounded


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "icarl", "eval__metrics": ("nmc",)},
        {"buffer__tier": "host", "strategy": "er_ace"},
        pytest.param({"strategy": "bic"}, marks=pytest.mark.slow),
        pytest.param({"strategy": "agem"}, marks=pytest.mark.slow),
        pytest.param({"strategy": "uer", "latent__layer": "features", "steps_per_call": 0}, marks=pytest.mark.slow),
    ],
    ids=lambda x: x["strategy"],
)
def test_every_way_of_replay_works_on_aged_rows(changes, pretrained, tmp_path):
    result = run(pretrained, tmp_path / "run", **{"optimizer__scales": {"backbone": 0.1}} | changes)
    assert result["average_accuracy"] > 0.3


SLOW = {"latent__layer": "Dense_0", "latent__below": "slow", "optimizer__scales": {"Dense_0": 0.1}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent__below": "slow"}, "latent.below: 'slow' is not allowed, give frozen without latent.layer"),
        (
            SLOW | {"strategy": "incremental"},
            "latent.below: 'slow' is not allowed, give frozen with incremental, which rep",
        ),
        (
            SLOW | {"strategy": "gdumb"},
            "latent.below: 'slow' is not allowed, give frozen with gdumb, which replays no rows",
        ),
        (
            SLOW | {"strategy": "sharp"},
            "latent.below: 'slow' is not allowed, give frozen with sharp, which has to know",
        ),
        (SLOW | {"latent__views": 1}, "latent.views: 1 is not allowed, give none of it with latent.below = slow"),
        (SLOW | {"latent__cache": "x"}, "latent.cache: 'x' is not allowed, give none of it with latent.below = slow"),
        (SLOW | {"microbatches": 2}, "microbatches: 2 is not allowed, give 1 with latent.below = slow"),
        (
            SLOW | {"finetune__epochs": 1, "buffer__selection__by": "random"},
            "finetune.epochs: 1 is not allowed, give 0 with latent.below = slow",
        ),
        (
            SLOW | {"buffer__replay": "append", "buffer__selection__by": "random"},
            "buffer.replay: 'append' is not allowed, give draw with latent.below = slow",
        ),
        (
            SLOW | {"optimizer__scales": {"head": 2.0}},
            "optimizer.scales: none for Dense_0, which latent.below = slow needs",
        ),
        (SLOW | {"latent__layer": "Dense_9"}, "latent.layer: no such part"),
    ],
)
def test_what_does_not_go_together_costs_one_line(changes, words, tmp_path):
    assert said("training", tmp_path / "run", **changes).startswith(words)
