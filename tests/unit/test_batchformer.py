"""BatchFormer: attention across the rows of a batch against NumPy, and the same step on any number of devices."""

import jax
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.models import make_model
from jaxcl.strategies import make_strategy
from tests.rig import Rig, close, make_batch, make_draw


def across_rows(params, x, valid):
    """The layer of BatchFormer in NumPy."""

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * params[name]["scale"] + params[name]["bias"]

    def of_heads(name):
        return np.einsum("nd,dhe->nhe", x, params[name]["kernel"]) + params[name]["bias"]

    query, key, value = map(of_heads, ("query", "key", "value"))
    like = np.where(valid, np.einsum("nhe,mhe->hnm", query, key) / np.sqrt(query.shape[-1]), -np.inf)
    share = np.exp(like - like.max(-1, keepdims=True))
    seen = np.einsum("hnm,mhe->nhe", share / share.sum(-1, keepdims=True), value)
    x = norm("norm_1", x + np.einsum("nhe,hed->nd", seen, params["out"]["kernel"]) + params["out"]["bias"])
    hidden = np.maximum(x @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
    return norm("norm_2", x + hidden @ params["last"]["kernel"] + params["last"]["bias"])


def test_batchformer_is_attention_across_the_valid_rows_and_evaluation_leaves_it_out():
    model = make_model("mlp", 3, options={"hidden": (8,), "batchformer": 2})
    variables = model.init(jax.random.key(0), (4, 4, 1))
    images = np.random.default_rng(0).normal(size=(6, 4, 4, 1)).astype(np.float32)
    valid = np.array([True, False, True, True, False, True])
    outputs, _ = model.apply(**variables, images=images, train=True, mask=valid)
    params = jax.device_get(variables["params"])
    expected = across_rows(params["batchformer"], np.asarray(outputs["features"]), valid)
    expected = expected @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(outputs["batch_logits"][valid], expected[valid], rtol=1e-4, atol=1e-4)
    assert "batch_logits" not in model.apply(**variables, images=images, train=False)[0]


def test_a_step_with_batchformer_is_the_same_on_any_number_of_devices(mesh_of):
    found = []
    for n in (1, 2, 8):
        rig = Rig(mesh_of(n), make_strategy("er"), "mlp", network={"batchformer": 4})
        state = rig.stage(rig.state(stored=False), [make_draw(1)])
        after, metrics = rig.step(state, rig.rows(make_batch(0)))
        found.append(jax.device_get((after.params, metrics)))
    close(found[1], found[0], rtol=1e-4, atol=1e-5)
    close(found[2], found[0], rtol=1e-4, atol=1e-5)
    start = jax.device_get(rig.state(stored=False).params["batchformer"]["query"]["kernel"])
    assert np.abs(found[0][0]["batchformer"]["query"]["kernel"] - start).max() > 0  # it learns


@pytest.mark.parametrize(("heads", "message"), [(-1, "0 or a positive int"), (3, "a divisor of its 8 features")])
def test_bad_heads_of_batchformer(heads, message):
    with pytest.raises(UserError, match=f"model.options.batchformer: {heads} is not allowed, give {message}"):
        make_model("mlp", 3, options={"hidden": (8,), "batchformer": heads}).init(jax.random.key(0), (4, 4, 1))
