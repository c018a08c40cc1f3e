"""Parts of weights with what else a run may ask for: frozen parts and rates of their own, norms, loaded weights, lengths of
layers, the noise of gradients, rows in parts. What is right on whole weights is the same on parts, or refused in one line."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxcl.errors import UserError
from jaxcl.models import NORMS, with_still
from jaxcl.optimizer import layers, make_optimizer
from jaxcl.partition import Split
from jaxcl.strategies import make_strategy
from jaxcl.training.build import build
from jaxcl.training.config import check_config, default_config
from jaxcl.training.step import make_train_step
from tests.rig import Rig, close, make_batch, make_draw
from tests.unit.test_config import changed
from tests.unit.test_norms import OPTIONS
from tests.unit.test_partition import MLP
from tests.whole import small

RULES = tuple((rule.pattern, rule.axes) for rule in MLP)


def optimizer_named(name):
    config = default_config().optimizer
    config.name, config.momentum, config.weight_decay, config.clip_norm, config.trust = name, 0.9, 0.01, 1.0, 0.1
    return lambda squares: optax.chain(make_optimizer(config, squares=squares), optax.scale(0.1))


def learnt(mesh, strategy="incremental", model="mlp", steps=3, frozen=(), **options):
    """A rig, its state before and after some steps, and the metrics of the last."""
    rig = Rig(mesh, make_strategy(strategy), model, frozen=frozen, **options)
    step = make_train_step(dataclasses.replace(rig.bound, model=with_still(rig.model, frozen)), 0).program
    state = rig.state(stored=False, task=np.int32(1))
    before, metrics = jax.device_get(state), None
    for t in range(steps):
        draws = [make_draw(9 + i) for i in range(rig.strategy.draws)]
        state, metrics = step(rig.stage(state, draws) if draws else state, rig.rows(make_batch(t)))
    return rig, before, state, jax.device_get(metrics)


@pytest.mark.parametrize("name", ["sgd", "lars", "lamb"])
def test_frozen_parts_rates_of_parts_and_lengths_of_layers_on_parts_of_the_weights(name, mesh_of_shape):
    """On 2 x 2 x 2, with the optimiser's state split too, what 8 devices learn that hold everything."""
    options = {"frozen": ("Dense_0",), "scales": {"head": 0.5}, "optimizer": optimizer_named(name)}
    _, before, whole, expected = learnt(mesh_of_shape(8, 1, 1), network={"hidden": (12, 8)}, **options)
    wide = Split(r"Dense_1\.kernel", ("fsdp", "model"))
    options |= {"rules": (*MLP, wide), "split_state": True, "microbatches": 2}
    rig, _, parts, found = learnt(mesh_of_shape(2, 2, 2), network={"hidden": (12, 8)}, **options)
    close(jax.device_get(parts.params), jax.device_get(whole.params), rtol=1e-4, atol=1e-5)
    close(found, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parts.params["Dense_0"]), before.params["Dense_0"])
    assert not np.array_equal(parts.params["Dense_1"]["kernel"], before.params["Dense_1"]["kernel"])
    assert rig.layout.params["Dense_0"]["kernel"] == rig.layout.params["Dense_1"]["kernel"] == P("fsdp", "model")
    assert "data" in rig.layout.updated["head"]["kernel"]


def test_a_bias_of_two_axes_is_no_layer():
    params = {"query": {"kernel": np.ones((4, 2, 2)), "bias": np.ones((2, 2))}, "norm": {"scale": np.ones(4)}}
    assert layers(params) == {"query": {"kernel": True, "bias": False}, "norm": {"scale": False}}


QUICK = ("sync", "ghost", "ada")


@pytest.mark.parametrize("norm", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NORMS])
def test_a_norm_along_data_and_fsdp_is_the_norm_along_data(norm, mesh_of_shape):
    """The parts of groups, tasks and penalties too; two places along each axis, in the order of the rows."""
    options = {"rows": 8} if norm == "ghost" else OPTIONS.get(norm, {})
    more = {"strategy": "er", "model": "mlp_norm", "network": {"norm": norm, "norm_options": options}, "steps": 2}
    _, _, whole, expected = learnt(mesh_of_shape(4, 1, 1), **more)
    rig, _, parts, found = learnt(mesh_of_shape(2, 2, 1), **more)
    assert rig.layout is not None
    for name in ("params", "batch_stats"):
        close(jax.device_get(getattr(parts, name)), jax.device_get(getattr(whole, name)), rtol=1e-4, atol=2e-5)
    close(found, expected, rtol=1e-4, atol=1e-5)


def test_batchformer_along_data_and_fsdp_is_the_one_along_data(mesh_of_shape):
    more = {"strategy": "er", "network": {"batchformer": 4}, "steps": 2}
    _, _, whole, expected = learnt(mesh_of_shape(4, 1, 1), **more)
    _, _, parts, found = learnt(mesh_of_shape(2, 2, 1), **more)
    close(jax.device_get(parts.params), jax.device_get(whole.params), rtol=1e-4, atol=2e-5)
    close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_noise_of_gradients_along_data_and_model_is_that_along_data(mesh_of_shape):
    _, _, _, expected = learnt(mesh_of_shape(4, 1, 1), noise=True)
    _, _, _, found = learnt(mesh_of_shape(4, 1, 2), noise=True, rules=MLP, split_state=True, microbatches=2)
    assert {"gradient_square", "gradient_noise"} <= found.keys()
    close(found, expected, rtol=1e-4, atol=1e-5)


def built(shape=(4, 1, 1), **changes):
    data, fsdp, model = shape
    sizes = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__model": model}
    return build(changed(small(), **sizes | changes), jax.devices()[: data * fsdp * model])


def test_loaded_weights_lie_as_the_rules_say(tmp_path, mesh_of_shape):
    own = jax.device_get(built().new_weights(jax.random.key(5))[0])
    flat = {f"params.{part}.{name}": x for part, found in own.items() for name, x in found.items()}
    np.savez(tmp_path / "w.npz", **flat)
    parts = built((2, 2, 2), mesh__rules=RULES, model__init_from=str(tmp_path / "w.npz"))
    shapes = jax.eval_shape(parts.new_weights, jax.random.key(0))
    params, _, opt_state = parts.new_weights(jax.random.key(0))
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), own)
    kernel = params["Dense_0"]["kernel"]
    assert kernel.sharding.spec == P("fsdp", "model") and kernel.addressable_shards[0].data.size == kernel.size // 4
    assert opt_state[-1].trace["Dense_0"]["kernel"].sharding.spec == P("fsdp", "model")
    again = parts.new_weights(jax.random.key(1))[0]  # nothing of the first is shared or used up
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), own)


CONVNET = {"model__name": "convnet"}


@pytest.mark.parametrize(
    "changes, why",
    [
        ({**CONVNET, "model__options": {"width": 2}}, "1 with convnet, whose batch norm mixes rows"),
        (
            {**CONVNET, "model__options": {"width": 2, "norm": "ada"}, "freeze": ("AdaB2N_0",)},
            "1 with convnet, whose batch norm mixes rows",
        ),
        ({"model__options": {"hidden": (8,), "batchformer": 2}}, r"1 with model.options.batchformer, which mixes rows"),
        ({"model__name": "tests.unit.test_partition_with:fined"}, "which gives penalty of all rows together"),
    ],
)
def test_microbatches_are_refused_where_rows_meet(changes, why):
    with pytest.raises(UserError, match=why) as caught:
        built(microbatches=2, **{"model__options": {}} | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__options": {"width": 8, "norm": "group"}},
        {"model__options": {"width": 2}, "freeze": ("backbone",)},  # by running statistics
    ],
)
def test_microbatches_go_with_norms_in_which_rows_do_not_meet(changes):
    assert built(microbatches=2, **CONVNET, **changes).train_step is not None


def fined(num_classes):
    import flax.linen as nn

    class Fined(nn.Module):
        @nn.compact
        def __call__(self, images, *, train, mask=None):
            x = images.reshape(len(images), -1)
            if train:
                self.sow("penalties", "size", (x**2).mean())
            return {"logits": nn.Dense(num_classes, name="head")(x), "features": x}

    return Fined()


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"fsdp": 2}, "optimizer.noise_scale: True is not allowed, give False with mesh.fsdp"),
        ({"model": 8}, "optimizer.noise_scale: True is not allowed, give False on one device"),
    ],
)
def test_the_noise_of_gradients_needs_those_of_several_devices(changes, why):
    config = default_config()
    config.mesh.update(changes)
    config.optimizer.noise_scale = True
    with pytest.raises(UserError, match=why):
        check_config(config, 8)
