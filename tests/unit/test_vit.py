"""The Vision Transformer: published sizes, names and layout of timm's, recomputation, dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.models import make_model

TINY = {"width": 16, "depth": 2, "heads": 2, "patch": 4}
PUBLISHED = {"Ti": 5_717_416, "S": 22_050_664, "B": 86_567_656, "L": 304_326_632}  # timm's, patch 16, 1,000 classes


def shapes_of(side=224, classes=1000, dtype="float32", **options):
    model = make_model("vit", classes, options=options, dtype=dtype)
    return model, jax.eval_shape(lambda key: model.init(key, (side, side, 3)), jax.random.key(0))


@pytest.mark.parametrize("size, parameters", PUBLISHED.items())
def test_parameters_are_those_published(size, parameters):
    _, variables = shapes_of(size=size, patch=16)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == parameters
    assert variables["batch_stats"] == {}


def test_every_array_has_the_size_of_timms_of_that_name():
    """The names and shapes of timm 1.0's `vit_tiny_patch16_224`, put together as the docstring of the model says."""
    params = shapes_of(size="Ti", patch=16)[1]["params"]
    width, names = 192, {f"block_{i}" for i in range(12)}
    assert params.keys() == {"patch_embed", "cls_token", "pos_embed", "norm", "head", *names}
    assert params["cls_token"].shape == (1, width) and params["pos_embed"].shape == (197, width)
    assert params["patch_embed"]["kernel"].shape == (16, 16, 3, width)
    block = jax.tree.map(lambda x: x.shape, params["block_0"])
    assert block["attn"] == {
        **{name: {"kernel": (width, 3, 64), "bias": (3, 64)} for name in ("query", "key", "value")},
        "out": {"kernel": (3, 64, width), "bias": (width,)},
    }
    assert block["fc1"] == {"kernel": (width, 4 * width), "bias": (4 * width,)}
    assert block["fc2"] == {"kernel": (4 * width, width), "bias": (width,)}
    assert block["norm1"] == block["norm2"] == {"scale": (width,), "bias": (width,)}


def test_small_images_have_small_patches():
    model, variables = shapes_of(32, 10, size="S")
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    outputs, _ = jax.eval_shape(functools.partial(model.apply, train=True), **variables, images=images)
    assert variables["params"]["pos_embed"].shape == (65, 384)
    assert {name: x.shape for name, x in outputs.items()} == {"logits": (2, 10), "features": (2, 384)}


def test_bfloat16_is_of_the_computation_alone():
    model, variables = shapes_of(8, 10, "bfloat16", **TINY)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    lowered = jax.jit(functools.partial(model.apply, train=True)).lower(**variables, images=images)
    assert {x.dtype for x in jax.tree.leaves(lowered.out_info)} == {jnp.dtype("float32")}
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert len(products) == 2 * 8 + 1
    assert sum(line.count("xbf16>") >= 2 for line in products) == 2 * 8  # what is multiplied, in all but the head


def test_remat_changes_no_gradient_and_computes_the_blocks_twice():
    shape, rng = (8, 8, 1), np.random.default_rng(0)
    images = rng.normal(size=(4, *shape)).astype(np.float32)
    found = {}
    for remat in (False, True):
        model = make_model("vit", 3, options=TINY | {"remat": remat})
        variables = model.init(jax.random.key(0), shape)

        def loss(params, model=model):
            return jnp.sum(jnp.square(model.apply(params, {}, images, train=True)[0]["logits"]))

        lowered = jax.jit(jax.grad(loss)).lower(variables["params"])
        found[remat] = lowered.as_text().count("dot_general"), lowered.compile()(variables["params"])
    assert found[True][0] > found[False][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[True][1], found[False][1])


@pytest.mark.parametrize(
    "options, field",
    [
        ({"heads": 3}, "heads: 3"),
        ({"patch": 3}, "patch: 3"),
        ({"size": "XL"}, "size: 'XL'"),
        ({"width": -1}, "width: -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, field):
    with pytest.raises(UserError, match=f"model.options.{field}"):
        shapes_of(8, 10, **TINY | options)
