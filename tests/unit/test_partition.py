"""Weights on a mesh: what the rules say, what is refused, and the laws of a step on every shape of a mesh."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxcl import mesh as mesh_lib
from jaxcl.errors import UserError
from jaxcl.models import make_model
from jaxcl.optimizer import make_optimizer
from jaxcl.partition import Split, bytes_on_device, make_layout
from jaxcl.strategies import make_strategy
from jaxcl.training.config import check_config, default_config
from jaxcl.training.given import Program
from tests.rig import Rig, close, make_batch, make_draw

# On as many row shards the same draws; the first has the weights whole.
SHAPES = (4, 1, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2)
MLP = (
    Split(r"Dense_0\.kernel", ("fsdp", "model")),
    Split(r"Dense_0\.bias", ("model",)),
    Split(r"head\.kernel", ("model", None)),
)
FAST = {"xla_backend_optimization_level": 0}  # compiling is most of the time here


def shapes_of(name, options, side=32, classes=10):
    model = make_model(name, classes, options=options)
    return model, jax.eval_shape(lambda key: model.init(key, (side, side, 3))["params"], jax.random.key(0))


def laid_out(mesh, name="vit", options=None, given=(), rules=None, **more):
    options = {"width": 32, "depth": 1, "heads": 4} if options is None else options
    model, params = shapes_of(name, options)
    opt_state = jax.eval_shape(optax.adam(0.1).init, params)
    rules = model.rules if rules is None else rules
    return params, make_layout(mesh, rules, params, opt_state, {"model": (params, {})}, given=given, model=name, **more)


# --- the rules -------------------------------------------------------------------------------------------------------


def test_rules_divide_what_they_name_and_all_that_is_like_it(mesh_of_shape):
    params, layout = laid_out(mesh_of_shape(2, 2, 2))
    block, wide = layout.params["block_0"], P("fsdp", "model")
    assert block["fc1"]["kernel"] == wide and block["fc1"]["bias"] == P("model")
    assert block["attn"]["query"]["kernel"] == P("fsdp", "model", None)
    assert block["attn"]["out"]["kernel"] == P("model", None, "fsdp")
    assert block["norm1"]["scale"] == P() and layout.params["cls_token"] == P()
    adam = layout.opt_state[0]
    assert adam.mu["block_0"]["fc1"]["kernel"] == adam.nu["block_0"]["fc1"]["kernel"] == wide and adam.count == P()
    assert layout.strategy_state["model"][0]["block_0"]["fc2"]["kernel"] == P("model", "fsdp")
    assert layout.updated == layout.params
    assert jax.tree.structure(layout.shapes) == jax.tree.structure(params)


def test_along_an_axis_of_one_place_nothing_is_divided(mesh_of_shape, mesh_of):
    assert laid_out(mesh_of(8))[1] is None
    _, layout = laid_out(mesh_of_shape(2, 1, 2))
    assert layout.params["block_0"]["fc1"]["kernel"] == P(None, "model")


def test_a_model_without_rules_has_its_longest_axes_divided_along_fsdp(mesh_of_shape):
    _, layout = laid_out(mesh_of_shape(2, 4, 1), "mlp", {"hidden": (12, 6)})
    assert layout.params["Dense_0"] == {"kernel": P("fsdp", None), "bias": P()}
    assert layout.params["Dense_1"]["kernel"] == P("fsdp", None)
    assert layout.params["head"]["kernel"] == P(None, None)  # 6 x 10: neither can be


def test_the_rules_of_the_config_go_first(mesh_of_shape):
    given = [Split(r"block_\d+\.fc1\.kernel", ("model", "fsdp"))]
    _, layout = laid_out(mesh_of_shape(2, 2, 2), given=given)
    assert layout.params["block_0"]["fc1"]["kernel"] == P("model", "fsdp")
    assert layout.params["block_0"]["fc2"]["kernel"] == P("model", "fsdp")


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"given": [Split("fc9", (None,))]}, r"mesh.rules: 'fc9' is not allowed, give the end of a parameter's name"),
        ({"given": [Split(r"fc1\.kernel", ("fsdp",))]}, r"mesh.rules: .* for each of 2 axes of block_0.fc1.kernel"),
        (
            {"options": {"width": 30, "depth": 1, "heads": 3}},
            "mesh.model: 2 is not allowed, give a divisor of 3, the axis",
        ),
        (
            {"given": [Split("cls_token", ("fsdp", None))]},
            "mesh.fsdp: 2 is not allowed, give a divisor of 1, the axis 0 of cls_token",
        ),
        ({"name": "mlp", "options": {}}, "mesh.model: 2 is not allowed, give 1: mlp has no rule"),
    ],
)
def test_what_cannot_be_divided_is_refused(mesh_of_shape, options, problem):
    with pytest.raises(UserError, match=problem) as caught:
        laid_out(mesh_of_shape(2, 2, 2), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sizes, problem",
    [
        (
            {"data": 3},
            r"mesh: data \* fsdp \* model = 3 x 1 x 1 is not allowed, give sizes that multiply to the 8 devices",
        ),
        ({"fsdp": 3}, r"mesh: fsdp \* model = 3 x 1 is not allowed, give a divisor of the 8 devices"),
        ({"model": 16}, r"mesh: fsdp \* model = 1 x 16"),
        ({"model": 2, "batch_size": 62}, r"batch_size: 62 is not allowed, give a multiple of 4 devices"),
        ({"fsdp": -1}, r"mesh.fsdp: -1 is not allowed, give a number from 1"),
        ({"rules": (("a(", (None,)),)}, r"mesh.rules: .* is not allowed, give a list with each item a pattern"),
        ({"rules": (("a", ("data",)),)}, r"mesh.rules: .* fsdp, model or None"),
        ({"microbatches": 7}, r"microbatches: 7 is not allowed, give a divisor of the 16 rows of a device"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_compiled(sizes, problem):
    config = default_config()
    for name, value in sizes.items():
        (config.mesh if name in config.mesh else config)[name] = value
    with pytest.raises(UserError, match=problem):
        check_config(config, 8)


def test_a_foreign_strategy_whose_gradients_need_whole_weights_is_refused(monkeypatch):
    config = default_config()
    config.mesh.fsdp = 2
    config.strategy = "agem"
    check_config(config, 8)
    blind = make_strategy("agem")._replace(by_parts=False)
    monkeypatch.setattr("jaxcl.training.config.make_strategy", lambda *args: blind)
    with pytest.raises(
        UserError, match=r"mesh.fsdp: 2 is not allowed, give 1 with agem, whose gradients need whole weights"
    ):
        check_config(config, 8)


@pytest.mark.parametrize("size", ["Ti", "B", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in "SL")])
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (1, 2, 4)])
def test_a_device_holds_its_share_of_weights_and_moments(mesh_of_shape, size, shape):
    mesh = mesh_of_shape(*shape)
    if (size == "Ti" and shape[2] > 1) or (size == "S" and shape[2] > 2):
        return  # 3 and 6 heads are not divided
    params, layout = laid_out(mesh, options={"size": size})
    opt_state = jax.eval_shape(optax.adam(0.1).init, params)
    here = bytes_on_device(mesh, layout.params, params) + bytes_on_device(mesh, layout.opt_state, opt_state)
    everything = sum(x.size * 4 for x in jax.tree.leaves((params, opt_state)))
    assert here <= 1.05 * everything / (shape[1] * shape[2])


# --- a device's parts ------------------------------------------------------------------------------------------------


def test_parts_make_the_whole_and_their_products_count_each_number_once(mesh_of_shape):
    """Inner product, squares and sum of parts against the whole arrays, along all three axes and with split state."""
    mesh, shape = mesh_of_shape(2, 2, 2), {"a": (8, 4), "b": (4,), "c": (3,), "d": (3, 6)}
    rules = Split("a", ("fsdp", "model")), Split("b", ("fsdp",))
    params = {name: jax.ShapeDtypeStruct(x, np.float32) for name, x in shape.items()}
    layout = make_layout(mesh, rules, params, {}, {}, split_state=True)
    assert layout.updated == {"a": P("fsdp", "model"), "b": P("fsdp"), "c": P(None), "d": P(None, "data")}
    rng = np.random.default_rng(0)
    x, y = ({name: rng.normal(size=s).astype(np.float32) for name, s in shape.items()} for _ in range(2))

    def step(x, y):
        again = layout.parts(layout.whole(x))
        grads, count = layout.summed(y, jnp.float32(1))
        return layout.joined(layout.own(again)), layout.vdot(x, y), layout.squares(layout.own(x)), grads, count

    program = mesh_lib.on_mesh(
        mesh, step, (layout.params, layout.params), (layout.params, P(), P(), layout.params, P())
    )
    again, dot, squares, grads, count = program(x, y)
    jax.tree.map(np.testing.assert_array_equal, again, x)
    np.testing.assert_allclose(dot, sum(np.vdot(x[name], y[name]) for name in shape), rtol=1e-5)
    close(squares, {name: np.square(z).sum() for name, z in x.items()}, rtol=1e-5)
    close(grads, {"a": 2 * y["a"], "b": 2 * y["b"], "c": 4 * y["c"], "d": 4 * y["d"]})  # a part is of one place
    assert count == 4


# --- the laws of a step ----------------------------------------------------------------------------------------------


def sgd(squares):
    config = default_config().optimizer
    config.momentum, config.clip_norm, config.weight_decay = 0.9, 1.0, 1e-3
    return optax.chain(make_optimizer(config, squares=squares), optax.scale(0.02))


def compiled(rig, state, batch):
    lowered = rig.step.lower(state, batch)
    return lowered, Program(lowered.function.compile(compiler_options=FAST), lowered.given)


def untimed(name):
    return contextlib.nullcontext()


class Ran:
    """Fifty steps of `er`: the ids of every draw, the last state, and the program."""

    def __init__(self, mesh, steps=50, **options):
        self.rig = Rig(mesh, make_strategy("er"), optimizer=sgd, **options)
        state, self.drawn = self.rig.state(), []
        batches = [self.rig.rows(make_batch(t) | {"id": np.arange(16, dtype=np.int32) + 16 * t}) for t in range(steps)]
        self.lowered, self.program = compiled(self.rig, state, batches[0])
        for batch in batches:
            state, metrics = self.program(state, batch)
            self.drawn.append(np.asarray(state.staged[0].id))
        self.state, self.metrics = state, jax.device_get(metrics)


@pytest.fixture(scope="module")
def ran(mesh_of_shape):
    return functools.cache(lambda *shape: Ran(mesh_of_shape(*shape), model="vit"))


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_every_shape_draws_the_same_rows_and_learns_the_same(ran, shape):
    expected, found = ran(*SHAPES[0]), ran(*shape)
    np.testing.assert_array_equal(found.drawn, expected.drawn)
    close(jax.device_get(found.state.params), jax.device_get(expected.state.params), rtol=0, atol=1e-5)
    close(found.metrics, expected.metrics, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_a_device_holds_no_more_than_the_rules_say(ran, shape):
    rig, state = ran(*shape).rig, ran(*shape).state
    held = jax.tree.leaves((state.params, state.opt_state))
    here = sum(x.addressable_shards[0].data.nbytes for x in held)
    specs = rig.layout.params, rig.layout.opt_state
    assert here == sum(
        bytes_on_device(rig.mesh, *one) for one in zip(specs, (state.params, state.opt_state), strict=True)
    )
    assert here < 0.45 * sum(x.nbytes for x in held) if shape[1] > 1 else True


def gathers(text):
    """Of every all-gather of floats in a compiled program: the numbers that a device then has, and the groups of devices."""
    for dims, groups in re.findall(r"= f32\[([\d,]*)\]\S* all-gather(?:-start)?\(.*?replica_groups=(\S+),", text):
        yield np.prod([int(n) for n in dims.split(",") if n], dtype=int), devices_of(groups)


def devices_of(groups):
    """`{{0,2},{1,3}}`, or `[2,2]<=[2,2]T(1,0)`: an array of all devices, transposed, and cut into groups."""
    if groups.startswith("{"):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"{([\d,]+)}", groups)]
    numbers = [[int(n) for n in part.split(",")] for part in re.findall(r"[\[(]([\d,]+)[\])]", groups)]
    shape, dims, *order = numbers
    return np.arange(np.prod(dims)).reshape(dims).transpose(*order).reshape(shape).tolist()


def test_groups_of_devices_are_read_as_xla_writes_them():
    assert devices_of("{{0,2},{1,3}}") == [[0, 2], [1, 3]]
    assert devices_of("[2,4]<=[8]") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert devices_of("[4,2]<=[2,2,2]T(1,2,0)") == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_weights_never_come_together_along_model(ran, shape):
    """No message between devices that differ along `model` brings as many numbers as a kernel has that `model` divides."""
    one = ran(*shape)
    leaves = zip(jax.tree.leaves(one.state.params), jax.tree.leaves(one.rig.layout.params), strict=True)
    least = min(x.size for x, spec in leaves if "model" in spec and x.size > 64)
    found = list(gathers(one.program.function.as_text()))
    along = [size for size, groups in found if any(len({device % 2 for device in group}) > 1 for group in groups)]
    assert max(along, default=0) < least, (along, least)
    assert len(found) - len(along) >= (6 if shape[1] > 1 else 0)  # the kernels, along fsdp


def test_along_fsdp_weights_come_anew_for_the_backward_pass(ran):
    """The blocks' kernels, in the program as it is given to the compiler: once in the forward pass, once more in the other."""
    text = ran(2, 2, 2).lowered.function.as_text()
    assert len(re.findall(r"all_gather.*tensor<16x64xf32>|all_gather.*tensor<16x32xf32>", text)) >= 2


def test_on_more_shards_too_where_each_holds_the_whole_memory(mesh_of_shape):
    """A replicated memory draws the same rows on any number of shards, so 8 x 1 x 1 learns what the others learn."""
    memory = {"memory": {"memory": "replicated"}, "rules": MLP}
    whole = Ran(mesh_of_shape(8, 1, 1), **memory | {"rules": ()})
    for shape in ((4, 1, 2), (2, 2, 2)):
        found = Ran(mesh_of_shape(*shape), **memory)
        np.testing.assert_array_equal(np.sort(found.drawn), np.sort(whole.drawn))  # dealt to other devices
        close(jax.device_get(found.state.params), jax.device_get(whole.state.params), rtol=0, atol=1e-5)


def test_temporaries_do_not_grow_with_the_capacity(mesh_of_shape):
    def temporaries(capacity):
        rig = Rig(mesh_of_shape(2, 2, 2), make_strategy("er"), capacity=capacity, rules=MLP)
        lowered = rig.step.lower(rig.state(), rig.rows(make_batch(0)))
        return lowered.function.compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(1024), temporaries(65536)
    assert many <= few + 1024


def test_with_split_state_every_device_keeps_its_part_and_nothing_changes(mesh_of_shape):
    def steps(split_state):
        optimizer = optax.chain(optax.trace(0.9), optax.scale(0.1))
        rig = Rig(mesh_of_shape(4, 1, 1), make_strategy("incremental"), optimizer=optimizer, split_state=split_state)
        state = rig.state()
        for t in range(4):
            state, _ = rig.step(state, rig.rows(make_batch(t)))
        return state

    whole, parts = steps(False), steps(True)
    jax.tree.map(np.testing.assert_array_equal, (whole.params, whole.opt_state), (parts.params, parts.opt_state))
    share = [x.addressable_shards[0].data.nbytes / x.nbytes for x in jax.tree.leaves(parts.opt_state)]
    assert sorted(share) == [0.25, 0.25, 0.25, 1.0]  # 64 x 12, 12 and 12 x 6 numbers of the network; the bias of 6 not


@pytest.mark.parametrize("name", ["er", pytest.param("uer", marks=pytest.mark.exhaustive), "er_ace", "der_pp", "agem"])
def test_microbatches_give_the_gradients_of_the_whole_batch(mesh_of_shape, name):
    """Of any loss, with rows that are not valid unevenly among devices and parts."""
    found = []
    for count in (1, 2):
        strategy = make_strategy(name)
        rig = Rig(mesh_of_shape(2, 1, 1), strategy, microbatches=count, replay_weight=0.5 if name == "er" else 1.0)
        draws = [make_draw(9 + i, logits=strategy.stores_outputs) for i in range(strategy.draws)]
        state = rig.stage(rig.state(stored=False), draws)
        batch = rig.rows(make_batch(3, classes=(0, 1)))
        after, metrics = rig.step(state, batch)
        found.append(jax.device_get((after.params, metrics)))
    close(*found)


NAMES = ["agem", "mir", "icarl", "bic", "der_pp", "er_ace", "sharp"]
MORE = ["l2", "ewc", "lwf", "uer", "feature_distillation"]


@pytest.mark.parametrize(
    "name, shape",
    [
        *(pytest.param(name, (1, 2, 2), marks=pytest.mark.slow) for name in NAMES),
        *(pytest.param(name, (1, 2, 2), marks=pytest.mark.exhaustive) for name in MORE),
        # With gradients or a network of their own.
        *(pytest.param(name, (1, 2, 1), marks=pytest.mark.exhaustive) for name in ("agem", "mir", "bic", "dytox")),
    ],
)
def test_every_strategy_learns_with_parts_what_it_learns_with_whole_weights(mesh_of_shape, name, shape):
    found = []
    for one in ((2, 1, 1), shape):
        strategy = make_strategy(name, {"replayed": 4} if name == "mir" else {})
        rules = MLP if one[2] > 1 else ()
        network = "dytox" if name == "dytox" else "mlp"
        rig = Rig(mesh_of_shape(*one), strategy, model=network, rules=rules, optimizer=sgd)
        state = rig.state(stored=False, task=np.int32(1))
        batches = [rig.rows(make_batch(t, classes=(2, 3))) for t in range(3)]
        draws = [make_draw(9 + i, logits=strategy.stores_outputs) for i in range(strategy.draws)]
        state = rig.stage(state, draws)
        _, program = compiled(rig, state, batches[0])
        for batch in batches:
            state, metrics = program(rig.stage(state, draws), batch)
        found.append(jax.device_get((state.params, metrics)))
    close(*found, rtol=1e-4, atol=1e-5)


def test_the_host_tier_goes_the_same_way_as_the_devices(mesh_of_shape):
    mesh, found = mesh_of_shape(2, 2, 2), []
    for tier in ("device", "host"):
        rig = Rig(mesh, make_strategy("er"), rules=MLP, optimizer=sgd, memory={"tier": tier})
        state = rig.state()
        batches = [rig.rows(make_batch(t) | {"id": np.arange(16, dtype=np.int32) + 16 * t}) for t in range(6)]
        with contextlib.ExitStack() as stack:
            if rig.buffer.host is not None:
                stack.enter_context(rig.buffer.host.serving(0, state.staged))
            step = rig.train_step.prepare(state, batches[0], untimed)
            for batch in batches:
                state, metrics = step(state, batch)
            found.append(jax.device_get((state.params, state.buffer.id, metrics)))
    jax.tree.map(np.testing.assert_array_equal, *found)
