"""Networks: sizes, dtypes, and the law that invalid rows weigh nothing, on one device and over four."""

import re
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcl.errors import UserError
from jaxcl.losses import cross_entropy
from jaxcl.models import MODELS, make_model
from jaxcl.models._norms._batch import MaskedBatchNorm

AXIS = "data"
TINY = {
    "mlp": ({"hidden": (5,)}, (4, 4, 1)),
    "convnet": ({"width": 2}, (8, 8, 3)),
    "resnet18": ({"width": 2}, (8, 8, 3)),
}
ROWS = 16
_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is most of the time here


def _init(model, shape):
    return _jit(model.init, static_argnums=1)(jax.random.key(0), shape)


def _tiny(name, **options):
    return make_model(name, 3, options={**TINY[name][0], **options}, axis_name=AXIS)


@cache
def _inputs(name):
    """params, batch_stats, images [ROWS, ...], labels [ROWS]."""
    shape, rng = TINY[name][1], np.random.default_rng(1)
    variables = _init(_tiny(name), shape)
    images = rng.normal(size=(ROWS, *shape)).astype(np.float32)
    return variables["params"], variables["batch_stats"], images, rng.integers(0, 3, ROWS)


def _loss(model, params, stats, images, labels, mask):
    """Sum over valid rows -> (loss, (logits, new batch_stats))."""
    outputs, stats = model.apply(params, stats, images, train=True, mask=mask)
    return (cross_entropy(outputs["logits"], labels) * mask).sum(), (outputs["logits"], stats)


@cache
def _step(name):
    """(params, stats, images, labels, mask) -> ((loss, (logits, new stats)), gradients) on one device."""
    return _jit(jax.value_and_grad(partial(_loss, _tiny(name)), has_aux=True))


def _close(found, expected, tolerance=2e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), found, expected)


@pytest.mark.parametrize(
    "name, options, shape, parameters",
    [
        ("mlp", {}, (28, 28, 1), 89_610),  # Mammoth's MNIST network
        ("mlp", {"hidden": ()}, (28, 28, 1), 7_850),
        ("convnet", {"width": 4}, (32, 32, 3), 27 * 4 + 36 * 8 + 72 * 16 + 2 * (4 + 8 + 16) + 170),
        ("resnet18", {}, (32, 32, 3), 11_173_962),
        ("ptychonn", {}, (64, 64, 1), 4_694_690),
        ("ptychonn", {"width": 16}, (32, 32, 1), 1_174_610),
    ],
)
def test_parameter_count(name, options, shape, parameters):
    model = make_model(name, 10, options=options)
    variables = jax.eval_shape(lambda key: model.init(key, shape), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters


IMAGENET = [  # options, parameters with 1,000 classes, features
    ("resnet18", {}, 11_689_512, 512),  # torchvision's
    ("resnet50", {}, 25_557_032, 2048),
    ("mobilenet_v3_small", {}, 2_542_856, 1024),
    ("convnext_tiny", {}, 28_589_128, 768),
    ("ghostnet", {"width": 1.0}, 5_182_508, 1280),  # timm's
    ("ghostnet", {"width": 0.5}, 2_587_292, 1280),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, options, parameters, features", IMAGENET)
def test_networks_for_imagenet_are_the_published_ones(name, options, parameters, features):
    """Parameter counts to the last weight; both stems give the outputs' shapes, all float32 around a bfloat16 body."""
    for stem, side in (("imagenet", 224), ("small", 32)):
        model = make_model(name, 1000, options=options | {"stem": stem}, dtype="bfloat16")
        variables = jax.eval_shape(lambda key, m=model, s=side: m.init(key, (s, s, 3)), jax.random.key(0))
        images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
        outputs, stats = jax.eval_shape(partial(model.apply, train=True), **variables, images=images)
        assert {key: value.shape for key, value in outputs.items()} == {"logits": (2, 1000), "features": (2, features)}
        assert stats == variables["batch_stats"]
        assert {leaf.dtype for leaf in jax.tree.leaves((variables, outputs))} == {jnp.dtype("float32")}
        if stem == "imagenet":
            assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet_v3_small", "ptychonn")),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("resnet50", "ghostnet", "convnext_tiny")),
    ],
)
def test_a_deep_network_computes_in_bfloat16_and_every_norm_is_synchronised_and_masked(name, mesh_of):
    options = {} if name in ("convnext_tiny", "ptychonn") else {"norm": "sync"}
    model = make_model(name, 10, options=options, dtype="bfloat16", axis_name=AXIS)
    variables = jax.eval_shape(lambda key: model.init(key, (32, 32, 3)), jax.random.key(0))
    masks = []

    def listen(call, args, kwargs, context):
        if isinstance(context.module, MaskedBatchNorm) and context.method_name == "__call__":
            masks.append(kwargs["mask"])
        return call(*args, **kwargs)

    @partial(jax.shard_map, mesh=mesh_of(2), in_specs=(P(), P(AXIS), P(AXIS)), out_specs=P(AXIS), check_vma=False)
    def forward(variables, rows, mask):
        with nn.intercept_methods(listen):
            outputs, _ = model.apply(**variables, images=rows, train=True, mask=mask)
        assert all(given is mask for given in masks)
        return outputs

    inputs = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32), jax.ShapeDtypeStruct((4,), bool)
    program = jax.jit(forward).lower(variables, *inputs).as_text()
    results = [found for _, found in re.findall(r"(convolution|dot_general).*-> tensor<[\dx]+x(\w+)>", program)]
    head = [] if name == "ptychonn" else [results.pop()]
    assert set(results) == {"bf16"} and set(head) <= {"f32"}
    norms = len(jax.tree.leaves(variables["batch_stats"])) // 2  # a mean and a variance each
    assert len(masks) == program.count("stablehlo.all_reduce") == norms


def test_ptychonn_gives_an_amplitude_and_a_phase_of_the_patterns_size():
    model = make_model("ptychonn", 5, options={"width": 2}, dtype="bfloat16")
    image = jax.ShapeDtypeStruct((2, 32, 48, 1), jnp.float32)
    variables = jax.eval_shape(lambda key: model.init(key, (32, 48, 1)), jax.random.key(0))
    outputs, stats = jax.eval_shape(partial(model.apply, train=True), **variables, images=image)
    assert {key: (x.shape, x.dtype.name) for key, x in outputs.items()} == {
        "amplitude": ((2, 32, 48, 1), "float32"),
        "phase": ((2, 32, 48, 1), "float32"),
    }
    assert stats == variables["batch_stats"] == {}
    with pytest.raises(UserError, match=r"images of \(8, 32\), give multiples of 16"):
        jax.eval_shape(lambda key: model.init(key, (8, 32, 1)), jax.random.key(0))


@pytest.mark.parametrize(
    "name, options, shape, features",
    [
        ("mlp", {"hidden": [7, 6]}, (8, 8, 1), 6),
        ("convnet", {"width": 4}, (8, 8, 3), 16),
        ("convnet", {"width": 4}, (64, 64, 1), 16),
        ("resnet18", {"width": 8}, (32, 32, 3), 64),
        ("resnet18", {"width": 8, "stem": "imagenet"}, (224, 224, 3), 64),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes(name, options, shape, features, dtype):
    model = make_model(name, 10, options=options, dtype=dtype)
    variables = jax.eval_shape(lambda key: model.init(key, shape), jax.random.key(0))
    images, mask = jax.ShapeDtypeStruct((2, *shape), jnp.float32), jax.ShapeDtypeStruct((2,), bool)
    apply = jax.jit(partial(model.apply, train=True))
    outputs, stats = jax.eval_shape(apply, variables["params"], variables["batch_stats"], images, mask=mask)
    assert {key: value.shape for key, value in outputs.items()} == {"logits": (2, 10), "features": (2, features)}
    assert stats == variables["batch_stats"] and bool(stats) == (name != "mlp")
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, outputs, stats))} == {jnp.dtype("float32")}

    program = apply.lower(variables["params"], variables["batch_stats"], images, mask=mask).as_text()
    results = re.findall(r"(convolution|dot_general).*-> tensor<[\dx]+x(\w+)>", program)
    *body, head = [found for _, found in results]
    assert head == "f32" and set(body) == {"bf16" if dtype == "bfloat16" else "f32"}


@pytest.mark.parametrize("name", TINY)
def test_invalid_rows_change_nothing(name):
    params, stats, images, labels = _inputs(name)
    valid = np.arange(ROWS) % 4 != 1
    valid[8:12] = False  # 9 of 16
    (loss, (logits, new_stats)), grads = _step(name)(params, stats, images, labels, valid)

    garbage, padding = np.where(valid[:, None, None, None], images, np.nan), np.where(valid, labels, -1)
    (_, (other, _)), _ = again = _step(name)(params, stats, garbage, padding, valid)
    np.testing.assert_array_equal(other[valid], logits[valid])
    jax.tree.map(np.testing.assert_array_equal, (again[0][1][1], again[1]), (new_stats, grads))

    repeated = np.resize(np.flatnonzero(valid)[:8], ROWS)  # 8 rows twice: as 8 valid rows, but sums double
    valid[repeated] = True
    valid[np.setdiff1d(np.arange(ROWS), repeated)] = False
    (loss, (logits, new_stats)), grads = _step(name)(params, stats, images, labels, valid)
    (twice, (only, only_stats)), sums = _step(name)(
        params, stats, images[repeated], labels[repeated], np.ones(ROWS, bool)
    )
    _close((2 * loss, logits[repeated], new_stats), (twice, only, only_stats))
    _close(jax.tree.map(lambda g: 2 * g, grads), sums, 2e-4)


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_zero_valid_rows(name):
    params, stats, images, labels = _inputs(name)
    (loss, (logits, new_stats)), grads = _step(name)(params, stats, images, labels, np.zeros(ROWS, bool))
    assert loss == 0 and np.isfinite(logits).all()
    jax.tree.map(np.testing.assert_array_equal, new_stats, stats)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)


def test_no_mask_is_all_valid_and_evaluation_reads_running_statistics():
    params, stats, images, _ = _inputs("convnet")
    apply = _jit(_tiny("convnet").apply, static_argnames="train")
    _close(apply(params, stats, images, train=True), apply(params, stats, images, train=True, mask=np.ones(ROWS, bool)))
    outputs, same = apply(params, stats, images, train=False)
    jax.tree.map(np.testing.assert_array_equal, same, stats)
    alone, _ = apply(params, stats, images[:1], train=False)
    _close(outputs["logits"][:1], alone["logits"])  # rows do not meet


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_sync_norm_over_four_devices_equals_one(name, mesh_of):
    params, stats, images, labels = _inputs(name)
    mask = np.arange(ROWS) % 4 < np.repeat([4, 1, 0, 2], 4)  # valid rows of each device

    @partial(
        jax.shard_map,
        mesh=mesh_of(4),
        in_specs=(P(), P(), P(AXIS), P(AXIS), P(AXIS)),
        out_specs=((P(), (P(AXIS), P())), P()),
        check_vma=False,
    )
    def sharded(*args):
        (loss, aux), grads = jax.value_and_grad(partial(_loss, _tiny(name, norm="sync")), has_aux=True)(*args)
        loss, grads = jax.lax.psum((loss, grads), AXIS)
        return (loss, aux), grads

    (loss, (logits, new_stats)), grads = _jit(sharded)(params, stats, images, labels, mask)
    (loss_1, (logits_1, stats_1)), grads_1 = _step(name)(params, stats, images, labels, mask)
    _close((loss, logits[mask], new_stats), (loss_1, logits_1[mask], stats_1))
    _close(grads, grads_1, 2e-4)


@pytest.mark.parametrize("norm, collectives", [("local", 0), ("sync", 3)])  # one stacked psum a norm
def test_collectives(norm, collectives, mesh_of):
    params, stats, images, _ = _inputs("convnet")

    @partial(jax.shard_map, mesh=mesh_of(2), in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    def forward(rows):
        return _tiny("convnet", norm=norm).apply(params, stats, rows, train=True)[0]

    assert jax.jit(forward).lower(images).as_text().count("stablehlo.all_reduce") == collectives


def test_norm_equals_linen_without_a_mask():
    x = np.random.default_rng(0).normal(3, 2, (5, 4, 4, 6)).astype(np.float32)
    ours, linen = MaskedBatchNorm(), nn.BatchNorm(momentum=0.9)
    variables = ours.init(jax.random.key(0), x, train=False)
    jax.tree.map(np.testing.assert_array_equal, variables, linen.init(jax.random.key(0), x, use_running_average=True))
    _close(
        ours.apply(variables, x, train=True, mutable=["batch_stats"]),
        linen.apply(variables, x, use_running_average=False, mutable=["batch_stats"]),
    )


def test_norm_takes_row_weights():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    norm = MaskedBatchNorm(momentum=0.0)
    variables = norm.init(jax.random.key(0), x, train=False)
    _, updates = norm.apply(variables, x, train=True, mask=np.array([0.5, 0.0, 1.5]), mutable=["batch_stats"])
    mean = np.average(x, 0, [1, 0, 3])
    _close(updates["batch_stats"], {"mean": mean, "var": np.average((x - mean) ** 2, 0, [1, 0, 3])})


def test_initialisers():
    def kernel(**options):
        variables = _init(make_model("mlp", 10, options=options), (20, 20, 1))
        assert not np.any(variables["params"]["Dense_0"]["bias"])
        return np.asarray(variables["params"]["Dense_0"]["kernel"])

    bound = np.sqrt(6 / (400 + 100))
    assert 0.99 * bound < np.abs(kernel(kernel_init="xavier")).max() <= bound
    assert kernel().std() == pytest.approx(1 / np.sqrt(400), rel=0.02)  # 40,000 draws: 6 sigma


def test_zero_init_makes_blocks_the_identity():
    model = _tiny("resnet18", zero_init=True)
    leaves = jax.tree_util.tree_leaves_with_path(_init(model, (8, 8, 3))["params"])
    assert sum(not np.any(leaf) for path, leaf in leaves if path[-1].key == "scale") == 8  # one a block


@pytest.mark.parametrize(
    "name, num_classes, dtype, options, message",
    [
        ("mpl", 10, "float32", {}, "model.name: 'mpl' is unknown, did you mean mlp?"),
        ("mlp", 0, "float32", {}, "num_classes: 0 is not allowed, give a positive int"),
        ("mlp", 10, "float16", {}, "model.dtype: 'float16' is not allowed, give one of float32, bfloat16"),
        ("mlp", 10, "float32", {"hiden": 8}, "model.options.hiden: mlp has no such option, did you mean hidden?"),
        (
            "mlp",
            10,
            "float32",
            {"width": 8},
            "model.options.width: mlp has no such option, allowed are hidden, kernel_init",
        ),
        ("mlp", 10, "float32", {"hidden": (8, -1)}, "model.options.hidden: (8, -1) is not allowed, give positive ints"),
        ("mlp", 10, "float32", {"hidden": 8}, "model.options.hidden: 8 is not allowed, give positive ints"),
        (
            "convnet",
            10,
            "float32",
            {"norm": "global"},
            "model.options.norm: 'global' is not allowed, give one of ada, bcn, ghost, group, layer, local, split, sync, "
            "unmix, or module:name",
        ),
        (
            "convnet",
            10,
            "float32",
            {"dtype": "float32"},
            "model.options.dtype: convnet has no such option, allowed are fold, norm, norm_options, width",
        ),
        ("resnet18", 10, "float32", {"width": True}, "model.options.width: True is not allowed, give a positive int"),
        ("resnet18", 10, "float32", {"width": 2.0}, "model.options.width: 2.0 is not allowed, give a positive int"),
        ("resnet18", 10, "float32", {"width": None}, "model.options.width: None is not allowed, give a positive int"),
        ("resnet18", 10, "float32", {"zero_init": 1}, "model.options.zero_init: 1 is not allowed, give True or False"),
        ("ghostnet", 10, "float32", {"width": 0.0}, "model.options.width: 0.0 is not allowed, give a positive number"),
        (
            "ghostnet",
            10,
            "float32",
            {"width": float("nan")},
            "model.options.width: nan is not allowed, give a positive number",
        ),
    ],
)
def test_user_mistakes(name, num_classes, dtype, options, message):
    with pytest.raises(UserError) as error:
        make_model(name, num_classes, options=options, dtype=dtype)
    assert str(error.value) == message


class Linear(nn.Module):
    """A model from outside: its fields are its options."""

    num_classes: int
    scale: float = 1.0
    sizes: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, images, *, train, mask=None):
        features = images.reshape(len(images), -1) * self.scale
        return {"logits": nn.Dense(self.num_classes)(features), "features": features}


def test_a_model_from_outside_is_a_class_of_modules_a_function_or_a_model():
    def outputs(model):
        params = model.init(jax.random.key(0), (2, 2, 1))["params"]
        return model.apply(params, {}, jnp.ones((3, 2, 2, 1)), train=False)[0]

    plain = make_model(f"{__name__}:Linear", 4, options={"scale": 2, "sizes": [1, 2]})
    assert outputs(plain)["logits"].shape == (3, 4) and (outputs(plain)["features"] == 2).all()
    assert outputs(make_model(f"{__name__}:linear", 4))["logits"].shape == (3, 4)
    assert make_model(f"{__name__}:made", 4) is _made
    for option, message in {
        "sacle": "model.options.sacle: .* did you mean scale",
        "name": "no such option, allowed are scale, sizes",
        "scale": "model.options.scale: 'a' is not allowed, give a number",
    }.items():
        with pytest.raises(UserError, match=message):
            make_model(f"{__name__}:Linear", 4, options={option: "a"})
    with pytest.raises(UserError, match=r"model.name: .*no_such.* cannot be imported"):
        make_model(f"{__name__}:no_such", 4)


def linear(num_classes, **_):
    return Linear(num_classes)


_made = make_model("mlp", 2)


def made():
    return _made


def test_models_are_found_by_their_files():
    classify = (
        "mlp mlp_norm convnet resnet18 resnet50 ghostnet mobilenet_v3_small convnext_tiny efficientnet_lite0 vit dytox"
    )
    assert set(MODELS) == {*classify.split(), "ptychonn"}
