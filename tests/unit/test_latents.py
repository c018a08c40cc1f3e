"""Activations for images: how they are stored, the two halves of a network, and whole runs on them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import latent
from jaxcl.errors import UserError
from jaxcl.models import make_model, split
from jaxcl.runs import checkpoint
from jaxcl.training import init_from
from jaxcl.training.build import build
from jaxcl.training.latents import Codec
from jaxcl.training.loop import train_and_evaluate
from jaxcl.training.trained import load
from tests.unit.test_bad_input import said
from tests.unit.test_config import changed
from tests.whole import assert_same_run, last, small, stop_at

# --- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", latent.DTYPES)
def test_what_is_stored_comes_back_but_for_rounding(dtype):
    x = (
        np.random.default_rng(0).normal(size=(5, 3, 2, 4)).astype(np.float32)
        * 10.0 ** np.arange(-2, 3)[:, None, None, None]
    )
    x[3] = 0
    stored = jax.jit(latent.encode, static_argnums=1)(x, dtype)
    assert stored.dtype == np.uint8 and stored.shape == (5, latent.row_bytes((3, 2, 4), dtype))
    found = np.asarray(jax.jit(latent.decode, static_argnums=(1, 2))(stored, (3, 2, 4), dtype))
    if dtype == "int8":
        step = np.abs(x).max((1, 2, 3), keepdims=True) / 127
        assert (np.abs(found - x) <= step / 2 * 1.001).all()
    else:
        np.testing.assert_array_equal(found, x.astype(jnp.dtype(dtype)).astype(np.float32))
    assert (found[3] == 0).all()
    far = latent.decode(latent.encode(jnp.array([[1e9, -1e9]]), "float16"), (2,), "float16")
    assert np.isfinite(far).all()


def test_a_view_is_drawn_by_key_and_number_and_the_plain_one_is_the_first():
    codec = Codec((4,), "float32", views=3)
    x = np.arange(2 * 4 * 4, dtype=np.float32).reshape(2, 4, 4)  # [row, view, number]
    rows = jnp.stack([latent.encode(x[:, view], "float32")[:, None] for view in range(4)], axis=1)
    assert rows.shape == (2, *codec.row_shape)
    np.testing.assert_array_equal(codec.plain(rows), x[:, 0])
    many = jnp.tile(rows[:1], (300, 1, 1, 1))
    drawn = np.asarray(codec.drawn(jax.random.key(0), jnp.arange(300), many))
    counts = [(drawn == x[0, view]).all(1).sum() for view in range(4)]
    assert counts[0] == 0 and min(counts[1:]) > 70 and sum(counts) == 300  # 5 sigma around 100
    half = codec.drawn(jax.random.key(0), jnp.arange(150, 300), many[150:])
    np.testing.assert_array_equal(half, drawn[150:])


# --- halves ------------------------------------------------------------------------------------------------------------

CUTS = [
    ("mlp", {"hidden": (5, 4)}, "Dense_0", ("Dense_0",)),
    ("mlp", {"hidden": (5, 4)}, "features", ("Dense_0", "Dense_1")),
    ("convnet", {"width": 2}, "MaskedBatchNorm_1", ("Conv_0", "Conv_1", "MaskedBatchNorm_0", "MaskedBatchNorm_1")),
    ("resnet18", {"width": 2}, "_Block_5", None),
    ("vit", {"width": 8, "depth": 2, "heads": 2}, "block_0", ("block_0", "cls_token", "patch_embed", "pos_embed")),
    ("vit", {"width": 8, "depth": 2, "heads": 2, "remat": True}, "features", None),
]


@pytest.mark.parametrize(("name", "options", "layer", "below"), CUTS)
def test_the_halves_together_are_the_whole(name, options, layer, below):
    model = make_model(name, 3, options=options)
    variables = model.init(jax.random.key(0), (16, 16, 3))
    params, stats = variables["params"], variables["batch_stats"]
    images = np.random.default_rng(0).normal(size=(6, 16, 16, 3)).astype(np.float32)
    halves = split(model, layer, (16, 16, 3))
    if below is not None:
        assert set(halves.below) == set(below)
    assert {"head"} < set(params) - set(halves.below) or layer == "features"
    z = jax.jit(halves.lower)(params, stats, images)
    assert z.shape == (6, *halves.shape)
    whole, _ = model.apply(params, stats, images, train=False)
    found, same = halves.upper.apply(params, stats, z, train=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, whole)
    jax.tree.map(np.testing.assert_array_equal, same, stats)
    mask = np.arange(6) < 4
    spoilt = jnp.where(mask.reshape(-1, *[1] * len(halves.shape)), z, jnp.nan)
    _, trained = halves.upper.apply(params, stats, spoilt, train=True, mask=mask)
    for part in trained:  # the norms below stay, those above have seen the valid rows
        moved = not all(jax.tree.leaves(jax.tree.map(np.array_equal, trained[part], stats[part])))
        assert moved == (part not in halves.below)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(trained[part]))


def test_above_the_layer_nothing_below_is_computed():
    model = make_model("convnet", 3, options={"width": 2})
    halves = split(model, "MaskedBatchNorm_1", (8, 8, 3))
    variables = jax.eval_shape(lambda key: model.init(key, (8, 8, 3)), jax.random.key(0))

    def convolutions(of, shape):
        def loss(params, stats, x):
            return of.apply(params, stats, x, train=True, mask=jnp.ones(2, bool))[0]["logits"].sum()

        x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        program = jax.jit(jax.grad(loss)).lower(variables["params"], variables["batch_stats"], x)
        return program.compile({"xla_backend_optimization_level": 0}).as_text().count(" convolution(")

    # Forward, the gradient of the kernel, and that of the input, which the lowest layer does not need.
    assert convolutions(model, (8, 8, 3)) == 8 and convolutions(halves.upper, halves.shape) == 2


def test_a_cut_that_is_none_is_refused():
    model = make_model("convnet", 3, options={"width": 2})
    for layer, words in (("head", "no such part"), ("Conv_9", "no such part; did you mean Conv_")):
        with pytest.raises(UserError, match=f"^latent.layer: {words}"):
            split(model, layer, (8, 8, 3))
    # Every position's shortcut passes this convolution by.
    around = make_model("tests.unit.test_latents:around", 3)
    with pytest.raises(UserError, match=r"^latent.layer: the network has a way around this part"):
        split(around, "side", (8, 8, 3))
    split(around, "body", (8, 8, 3))
    vit = make_model("vit", 3, options={"width": 8, "depth": 2, "heads": 2, "remat": True})
    with pytest.raises(
        UserError, match=r"^model.options.remat: True is not allowed, give False with latent.layer = block_0"
    ):
        split(vit, "block_0", (8, 8, 3))


def around(num_classes):
    import flax.linen as nn

    class Around(nn.Module):
        @nn.compact
        def __call__(self, images, *, train, mask=None):
            flat = images.reshape(len(images), -1)
            x = nn.Dense(4, name="body")(flat + nn.Dense(flat.shape[1], name="side")(flat))
            return {"logits": nn.Dense(num_classes, name="head")(x), "features": x}

    return Around()


# --- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose weights others begin with."""
    folder = tmp_path_factory.mktemp("first") / "run"
    train_and_evaluate(small(strategy="joint", epochs=4), folder, devices=jax.devices()[:1], progress=False)
    return folder


def on_activations(trained, **changes):
    more = {"model__init_from": str(trained), "latent__layer": "Dense_0", "strategy": "er"}
    return small(**more | changes)


def run(config, folder, devices=2):
    return train_and_evaluate(config, folder, devices=jax.devices()[:devices], progress=False)


def test_a_run_on_activations_is_the_run_on_images_with_what_lies_below_frozen(trained, tmp_path):
    """In float32, where storing changes nothing."""
    config = on_activations(trained, latent__dtype="float32")
    found = run(config, tmp_path / "latent")
    images = run(small(strategy="er", model__init_from=str(trained), freeze=("Dense_0",)), tmp_path / "images")
    np.testing.assert_allclose(found["accuracy_matrix"], images["accuracy_matrix"], atol=0.01)
    a, b = (last(tmp_path / name)[1] for name in ("latent", "images"))
    for name in a:
        if name.startswith("params."):
            np.testing.assert_allclose(a[name], b[name], atol=2e-3, err_msg=name)
    first = init_from.found_in(str(trained))
    np.testing.assert_array_equal(a["params.Dense_0.kernel"], first["params.Dense_0.kernel"])
    assert not np.array_equal(a["params.Dense_1.kernel"], first["params.Dense_1.kernel"])
    assert a["buffer.record.image"].shape == (40, 1, 1, 16 * 4) and a["buffer.record.image"].dtype == np.uint8
    said = found["latent"]
    assert said["bytes_per_row"] == 64 and said["frozen"] == ["Dense_0"] and said["relative_error"]["train"] == 0
    assert found["seconds_by_phase"]["features"] > 0 and "features" not in images["seconds_by_phase"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_what_fewer_bytes_cost_is_told(dtype, trained, tmp_path):
    found = run(on_activations(trained, latent__dtype=dtype), tmp_path / "run")["latent"]
    assert found["bytes_per_row"] == {"float16": 32, "bfloat16": 32, "int8": 20}[dtype]
    low, high = {"float16": (1e-5, 5e-4), "bfloat16": (5e-4, 4e-3), "int8": (1e-3, 1e-2)}[dtype]
    assert low < found["relative_error"]["train"] < high and low < found["relative_error"]["test"] < high


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "der_pp"},
        {"strategy": "icarl"},
        {"strategy": "ranpac", "latent__layer": "features"},
        {"buffer__tier": "host"},
        {"buffer__selection__by": "icarl", "finetune__epochs": 1, "eval__metrics": ("nmc",)},
        {"latent__layer": "features", "latent__dtype": "int8", "steps_per_call": 0},
    ],
    ids=lambda x: next(iter(x.values())),
)
def test_every_kind_of_run_works_on_activations(changes, trained, tmp_path):
    result = run(on_activations(trained, **changes), tmp_path / "run")
    assert result["average_accuracy"] > 0.3
    model = load(tmp_path / "run", devices=jax.devices()[:1])
    images = build(small(), jax.devices()[:1]).test
    answers = model.predict(images.read(np.arange(len(images)))).argmax(1)
    mine = np.mean(answers == images.labels)
    assert mine == pytest.approx(np.trace(result["confusion"]) / len(images), abs=0.01)
    assert model.image_shape == (8, 8, 1)


def test_a_stopped_run_ends_as_the_whole_and_on_other_devices(trained, tmp_path, monkeypatch):
    config = on_activations(trained, latent__cache=str(tmp_path / "cache"), latent__views=2, data__augment=("crop",))
    run(config, tmp_path / "whole")
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2
    stamps = [file.stat().st_mtime_ns for file in files]
    stop_at(monkeypatch, [20])
    with pytest.raises(Exception, match="saved at step"):
        run(config, tmp_path / "stopped")
    monkeypatch.undo()
    run(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    other = run(config, tmp_path / "four", devices=4)
    assert [file.stat().st_mtime_ns for file in files] == stamps  # read, not made again
    assert other["latent"] == json.loads((tmp_path / "whole" / "result.json").read_text())["latent"]


def test_the_cache_belongs_to_weights_rows_and_fields(trained, tmp_path):
    cache = tmp_path / "cache"
    config = on_activations(trained, latent__cache=str(cache), epochs=1)

    def other(**changes):
        return changed(config.copy_and_resolve_references(), **changes)

    whole = run(config, tmp_path / "a")
    assert len(list(cache.iterdir())) == 2
    run(other(seed=5), tmp_path / "seed")  # of the run, not of what lies below
    assert len(list(cache.iterdir())) == 2
    run(other(latent__dtype="int8"), tmp_path / "b")
    assert len(list(cache.iterdir())) == 4
    flat = init_from.found_in(str(trained))
    np.savez(tmp_path / "w.npz", **{**flat, "params.Dense_0.bias": flat["params.Dense_0.bias"] + 1})
    run(other(model__init_from=str(tmp_path / "w.npz")), tmp_path / "c")
    assert len(list(cache.iterdir())) == 6
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    again = run(config, tmp_path / "d")
    assert again["accuracy_matrix"] == whole["accuracy_matrix"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent__layer": "Dense_0"}, "model.init_from: None is not allowed with latent.layer"),
        ({"latent__views": 2}, "latent.views: 2 is not allowed, give none of it without latent.layer"),
        ({"latent__cache": "x"}, "latent.cache: 'x' is not allowed, give none of it without latent.layer"),
        (
            {"latent__layer": "Dense_0", "model__init_from": "F", "latent__views": 2},
            "latent.views: 2 is not allowed, give 0",
        ),
        (
            {"latent__layer": "Dense_0", "model__init_from": "F", "data__augment": ("crop",)},
            "latent.views: 0 is not allowed, give 1 or more: data.augment makes views",
        ),
        (
            {"latent__layer": "Dense_0", "model__init_from": "F", "data__workers": 1},
            "data.workers: 1 is not allowed, give 0 with latent.layer",
        ),
    ],
)
def test_fields_that_do_not_go_together_cost_one_line(changes, words, tmp_path):
    np.savez(tmp_path / "F.npz", **{"params.x": np.zeros(1)})
    if "model__init_from" in changes:
        changes = changes | {"model__init_from": str(tmp_path / "F.npz")}
    assert said("training", tmp_path / "run", **changes).startswith(words)


def test_a_layer_that_is_none_costs_one_line(trained, tmp_path):
    with pytest.raises(UserError, match=r"^latent.layer: no such part; did you mean Dense_[01]\?"):
        build(init_from.bound(on_activations(trained, latent__layer="Dense_7")), jax.devices()[:1])


def test_a_neck_is_new_behind_weights_from_a_file_and_no_layer_to_cut_at(tmp_path):
    config = small(model__name="efficientnet_lite0", model__options={"neck": (6, 5)})
    plain = make_model("efficientnet_lite0", 7)
    variables = jax.eval_shape(lambda key: plain.init(key, (8, 8, 1)), jax.random.key(0))
    flat = {name: np.ones(x.shape, x.dtype) for name, x in checkpoint.flatten(variables).items()}
    np.savez(tmp_path / "F.npz", **{name.replace(".", "/"): x for name, x in flat.items()})
    config.model.init_from, config.latent.layer = str(tmp_path / "F.npz"), "neck_0"
    with pytest.raises(
        UserError, match=r"^latent.layer: neck_0, below it, is not in the file of model.init_from; choose"
    ):
        build(init_from.bound(config), jax.devices()[:1])
    model = make_model("efficientnet_lite0", 7, options={"neck": (6, 5)})
    variables, images = model.init(jax.random.key(0), (8, 8, 1)), jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    params, stats, halves = variables["params"], variables["batch_stats"], split(model, "features", (8, 8, 1))
    assert halves.shape == (1280,) and {*params} - {*halves.below} == {"neck_0", "neck_1", "head"}

    @jax.jit
    def both(images):
        behind = halves.upper.apply(params, stats, halves.lower(params, stats, images), train=False)[0]
        return behind, model.apply(params, stats, images, train=False)[0]

    found, expected = both(images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    assert expected["features"].shape == (2, 5)
