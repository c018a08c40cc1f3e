"""Parts of a model: frozen in all training, with a learning rate of their own; images scaled on the device."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest

from jaxcl.data import make_augment, make_normalize
from jaxcl.errors import UserError
from jaxcl.models import make_model, parts_named, scale_of_parts, with_still
from jaxcl.strategies import make_strategy
from jaxcl.training.build import build
from jaxcl.training.loop import train_and_evaluate
from jaxcl.training.step import make_train_step
from jaxcl.training.trained import load
from tests.rig import RATE, Rig, close, make_batch, make_draw
from tests.unit.test_bad_input import said
from tests.unit.test_config import changed
from tests.whole import last, small

PARTS = ("stem", "block_0", "block_1", "head")


def test_names_of_parts():
    assert parts_named("f", ["backbone"], PARTS) == ["stem", "block_0", "block_1"]
    assert parts_named("f", ["block_*", "stem", "block_1"], PARTS) == ["block_0", "block_1", "stem"]
    assert parts_named("f", ["backbone"], ("backbone", "x", "head")) == ["backbone"]
    with pytest.raises(
        UserError, match=r"^f: 'blok' is no part of the model; choose from stem, block_0, block_1, head$"
    ):
        parts_named("f", ["stem", "blok"], PARTS)
    scales = scale_of_parts("s", {"backbone": 0.01, "block_1": 0.1}, PARTS)
    assert scales == {"stem": 0.01, "block_0": 0.01, "block_1": 0.1}
    with pytest.raises(UserError, match=r"^s: two of backbone, block_\* mean block_0; give it under its own name"):
        scale_of_parts("s", {"backbone": 0.01, "block_*": 0.1}, PARTS)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_a_frozen_part_stays_to_the_bit_and_the_rest_learns_as_beside_it(model, devices, mesh_of):
    """With momentum and decay, which would move it; the norms of a frozen part are those of evaluation."""
    first = {"mlp": ("Dense_0",), "convnet": ("Conv_0", "MaskedBatchNorm_0")}[model]
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.9))
    rig = Rig(mesh_of(devices), make_strategy("er"), model, optimizer=optimizer, frozen=first)
    bound = dataclasses.replace(rig.bound, model=with_still(rig.model, first))
    step = make_train_step(bound, 0).program
    before, state = jax.device_get(rig.state(stored=False)), rig.state(stored=False)
    for seed in range(2):
        state, _ = step(rig.stage(state, [make_draw(seed)]), rig.rows(make_batch(seed)))
    for name, x in before.params.items():
        moved = not all(jax.tree.leaves(jax.tree.map(np.array_equal, x, jax.device_get(state.params[name]))))
        assert moved == (name not in first), name
    for name in before.batch_stats:
        same = jax.tree.leaves(jax.tree.map(np.array_equal, before.batch_stats[name], state.batch_stats[name]))
        assert all(same) == (name in first), name


def test_the_gradient_of_what_is_not_frozen_is_that_of_the_loss(mesh_of):
    params = {}
    for frozen in ((), ("Dense_0",)):
        rig = Rig(mesh_of(4), make_strategy("er"), frozen=frozen)
        state, _ = rig.step(rig.stage(rig.state(stored=False), [make_draw(0)]), rig.rows(make_batch(0)))
        params[frozen] = jax.device_get(state.params)
    close(params[()]["head"], params[("Dense_0",)]["head"], rtol=1e-6)
    assert not np.array_equal(params[()]["Dense_0"]["kernel"], params[("Dense_0",)]["Dense_0"]["kernel"])


def test_what_is_frozen_does_not_travel(mesh_of):
    """The gradients of a frozen part are neither computed nor summed over the devices."""
    sizes = {}
    for frozen in ((), ("Dense_0",)):
        rig = Rig(mesh_of(2), make_strategy("incremental"), network={"hidden": (50,)}, frozen=frozen)
        text = rig.train_step.lower(rig.state(), rig.rows(make_batch(0)))[0].as_text()
        summed = re.findall(r"stablehlo\.all_reduce.*?\}\) : \((.*?)\)", text, re.DOTALL)
        sizes[frozen] = sum("64x50xf32" in one for one in summed), sum("50x6xf32" in one for one in summed)
    assert sizes == {(): (1, 1), ("Dense_0",): (0, 1)}


@pytest.mark.parametrize("devices", [1, 4])
def test_a_part_learns_at_a_rate_of_its_own(devices, mesh_of):
    moves = {}
    for scales in ({}, {"Dense_0": 0.01}):
        rig = Rig(mesh_of(devices), make_strategy("er"), scales=scales)
        before, state = jax.device_get(rig.state(stored=False).params), rig.state(stored=False)
        state, _ = rig.step(rig.stage(state, [make_draw(0)]), rig.rows(make_batch(0)))
        moves[bool(scales)] = jax.tree.map(np.subtract, jax.device_get(state.params), before)
    close(moves[True]["head"], moves[False]["head"])
    close(moves[True]["Dense_0"], jax.tree.map(lambda x: 0.01 * x, moves[False]["Dense_0"]), rtol=1e-3)
    assert np.abs(moves[False]["Dense_0"]["kernel"]).max() > 1e-3 * RATE


def test_still_parts_normalise_by_running_statistics():
    model = make_model("convnet", 4, options={"width": 2})
    variables = model.init(jax.random.key(0), (8, 8, 3))
    images = np.random.default_rng(0).normal(3, 2, (6, 8, 8, 3)).astype("f4")
    trained, evaluated = (model.apply(**variables, images=images, train=x)[0]["logits"] for x in (True, False))
    whole = with_still(model, list(variables["params"]))
    found, stats = whole.apply(**variables, images=images, train=True)
    np.testing.assert_array_equal(found["logits"], evaluated)
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])
    one, _ = with_still(model, ["MaskedBatchNorm_0"]).apply(**variables, images=images, train=True)
    assert not np.allclose(one["logits"], evaluated) and not np.allclose(one["logits"], trained)


def test_runs_with_frozen_and_slow_parts_are_the_same_on_any_devices(tmp_path):
    config = small(strategy="incremental", freeze=("Dense_0",), epochs=1)
    config = changed(config, optimizer__scales={"Dense_1": 0.1})
    found = {}
    for devices in (1, 4):
        train_and_evaluate(config, tmp_path / str(devices), devices=jax.devices()[:devices], progress=False)
        found[devices] = {name: x for name, x in last(tmp_path / str(devices))[1].items() if name.startswith("params")}
    new = jax.device_get(build(config, jax.devices()[:1]).new_weights(jax.random.fold_in(jax.random.key(0), 0))[0])
    for one in found.values():
        np.testing.assert_array_equal(one["params.Dense_0.kernel"], new["Dense_0"]["kernel"])
        assert not np.array_equal(one["params.Dense_1.kernel"], new["Dense_1"]["kernel"])
    close(found[1], found[4], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer__scales": {"body": 0.1}}, "optimizer.scales: 'body' is no part of the model; choose from "),
        ({"optimizer__scales": {"head": -0.1}}, "optimizer.scales.head: -0.1 is not allowed, give 0 or more"),
        ({"optimizer__scales": {"head": "x"}}, "optimizer.scales.head: 'x' is not allowed, give 0 or more"),
        ({"freeze": ("head", "nothing*")}, "freeze: 'nothing*' is no part of the model; choose from "),
    ],
)
def test_bad_parts_cost_one_line(changes, words, tmp_path):
    assert said("training", tmp_path / "run", **changes).startswith(words)


def test_images_are_scaled_after_they_were_augmented_and_normalised():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    by = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    plain = make_normalize((8, 8, 3), **by)(images)
    scaled = make_normalize((8, 8, 3), **by, side=16)(images)
    np.testing.assert_allclose(scaled, jax.image.resize(plain, (3, 16, 16, 3), "bilinear"), atol=1e-6)
    key, rows = jax.random.key(0), np.arange(3)
    augmented = make_augment(("crop", "flip"), (8, 8, 3), **by)(key, rows, images)
    np.testing.assert_allclose(
        make_augment(("crop", "flip"), (8, 8, 3), **by, side=16)(key, rows, images),
        jax.image.resize(augmented, (3, 16, 16, 3), "bilinear"),
        atol=1e-6,
    )


def test_a_run_on_scaled_images_stores_them_as_they_are_and_is_loaded(tmp_path):
    config = small(strategy="er", data__resize=16, epochs=1)
    result = train_and_evaluate(config, tmp_path / "run", devices=jax.devices()[:2], progress=False)
    assert last(tmp_path / "run")[1]["params.Dense_0.kernel"].shape[0] == 16 * 16
    assert result["buffer"]["bytes"] < 40 * (8 * 8 + 100)
    model = load(tmp_path / "run", devices=jax.devices()[:1])
    assert model.image_shape == (8, 8, 1)
    parts = build(config, jax.devices()[:1])
    images = parts.test.read(np.arange(len(parts.test)))
    accuracy = np.mean(model.predict(images).argmax(1) == parts.test.labels)
    assert accuracy == pytest.approx(np.mean(np.diag(result["confusion"]).sum() / len(images)), abs=0.01)
