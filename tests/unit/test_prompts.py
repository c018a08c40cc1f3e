"""Prompts of a Vision Transformer: the authors' forward pass, the same step on any number of devices, gradients, options."""

import dataclasses
import pathlib
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict
from scipy import special

from jaxcl.errors import UserError
from jaxcl.models import RowFacts, make_model, parts_named, split, with_still
from jaxcl.runs import checkpoint
from jaxcl.strategies import make_strategy
from jaxcl.training import init_from
from tests.rig import Rig, close, make_batch, make_draw

RECORDED = pathlib.Path(__file__).parent.parent / "data" / "prompts.npz"
PLACES = {  # of the authors' names, those here
    "embedding": "patch_embed",
    "encoder_norm": "norm",
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "MultiHeadDotProductAttention_0": "attn",
}
IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
SMALL = {"width": 16, "depth": 3, "heads": 2, "patch": 4, "gelu": "tanh"}
TASKS, CLASSES = 4, 5
POOL = {"kind": "l2p", "pool": 6, "length": 2, "top_k": 3}
ROWS = POOL | {"batchwise": False}
EXPERTS = {"kind": "dualprompt", "general_length": 2, "expert_length": 3, "expert_blocks": (1, 2)}
CASES = {
    "l2p/batch": (POOL, True),
    "l2p/rows": (ROWS, False),
    "l2p/token": (POOL | {"read": "token"}, True),
    "l2p/both": (POOL | {"read": "both"}, True),
    "l2p/layers": (ROWS | {"blocks": (0, 2)}, True),
    "dualprompt/task": (EXPERTS, True),
    "dualprompt/key": (EXPERTS, False),
}


@cache
def recorded():
    with np.load(RECORDED) as file:
        return dict(file)


@cache
def backbone():
    """The recorded weights by their places here."""
    found = {}
    for name, x in recorded().items():
        if not name.startswith("backbone/"):
            continue
        path = [PLACES.get(part, part) for part in name.split("/")[1:] if part not in ("Transformer", "MlpBlock_0")]
        path = [
            part.replace("encoderblock", "block").replace("Dense_0", "fc1").replace("Dense_1", "fc2") for part in path
        ]
        if path[0] in ("cls", "posembed_input"):
            path, x = ["cls_token" if path[0] == "cls" else "pos_embed"], x[0]
        found[tuple(path)] = x
    return unflatten_dict(found)


def prompts_of(case):
    theirs = {name: recorded()[f"{case}/prompt_pool/{name}"] for name in ("key", "prompt")}
    if case.startswith("l2p"):
        return {"keys": theirs["key"], "pool": theirs["prompt"]}
    return {"keys": theirs["key"], "expert": theirs["prompt"], "general": recorded()[f"{case}/prefix"][:2]}


def facts_of_tasks(tasks, valid=None):
    rows = np.arange(len(tasks), dtype=np.int32)
    valid = np.ones(len(tasks), bool) if valid is None else valid
    return RowFacts(
        valid, tasks, np.zeros(len(tasks), bool), rows, np.full_like(rows, len(rows)), np.int32(3), len(rows)
    )


def model_with(prompts, **options):
    options = SMALL | {"prompts": prompts} | options
    return make_model("vit", CLASSES, options=options, classes=np.ones((TASKS, CLASSES), bool))


def applied(model, params, images, train, mask):
    return jax.jit(partial(model.apply, train=train))(params, {}, images, mask=mask)[0]


@pytest.mark.parametrize("case", CASES)
def test_the_forward_pass_is_that_of_the_authors_code(case):
    """On weights and outputs recorded by tests/data/prompts.py."""
    prompts, train = CASES[case]
    model, images = model_with(prompts), recorded()["images"]
    params = backbone() | {"prompts": prompts_of(case)}
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(lambda: model.init(jax.random.key(0), images.shape[1:]))["params"])
    assert shapes == jax.tree.map(jnp.shape, params)
    outputs = applied(model, params, images, train, facts_of_tasks(recorded()["tasks"]))
    np.testing.assert_allclose(outputs["logits"], recorded()[f"{case}/logits"], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(outputs["features"], recorded()[f"{case}/pre_logits"], rtol=1e-4, atol=2e-5)
    if train:
        np.testing.assert_allclose(-outputs["penalty"].mean(), recorded()[f"{case}/reduce_sim"], rtol=1e-4)
    else:
        assert "penalty" not in outputs


def test_the_query_is_the_feature_without_prompts():
    plain = make_model("vit", CLASSES, options=SMALL)
    outputs = applied(plain, backbone(), recorded()["images"], False, None)
    np.testing.assert_allclose(outputs["features"], recorded()["query"], rtol=1e-4, atol=2e-5)


def test_invalid_rows_have_no_vote():
    """They would make another prompt the majority's."""
    model, images = model_with(POOL), recorded()["images"]
    params = backbone() | {"prompts": prompts_of("l2p/rows")}
    nearest = recorded()["l2p/rows/prompt_idx"]
    odd = int(np.flatnonzero((nearest == 1).any(1))[0])  # prompt 1 is seldom chosen
    valid = np.arange(len(images)) == odd
    outputs = applied(model, params, images, True, valid)
    alone = applied(model_with(ROWS), params, images, True, valid)
    np.testing.assert_allclose(outputs["logits"][odd], alone["logits"][odd], rtol=1e-5)
    everyone = applied(model, params, images, True, None)
    assert np.abs(everyone["logits"][odd] - outputs["logits"][odd]).max() > 1e-3


def test_gradients_reach_keys_and_prompts_and_nothing_by_the_query():
    images, facts = recorded()["images"], facts_of_tasks(recorded()["tasks"])
    for case, (prompts, _) in {name: CASES[name] for name in ("l2p/rows", "dualprompt/task")}.items():
        model, params = model_with(prompts), backbone() | {"prompts": prompts_of(case)}

        def outputs(params, model=model):
            found = model.apply(params, {}, images, train=True, mask=facts)[0]
            return found["penalty"].sum(), found["logits"].sum()

        pull, logits = jax.jit(jax.jacrev(outputs))(params)
        moved = {name for name, x in pull["prompts"].items() if np.any(x)}
        assert moved == {"keys"}
        assert not any(np.any(x) for x in jax.tree.leaves({**pull, "prompts": ()}))
        moved = {name for name, x in logits["prompts"].items() if np.any(x)}
        assert moved == params["prompts"].keys() - {"keys"}
    never = np.setdiff1d(np.arange(TASKS), recorded()["tasks"])
    chosen = np.abs(np.asarray(logits["prompts"]["expert"])).max((0, 1, 3, 4, 5)) > 0
    assert chosen.tolist() == [task not in never for task in range(TASKS)]


# --- steps ------------------------------------------------------------------------------------------------------------

SMALLEST = {
    "l2p": POOL | {"pool": 4, "top_k": 2},
    "dualprompt": {**EXPERTS, "general_blocks": (0,), "expert_blocks": (0,)},
}


def large_prompts(params):
    """Prompts as far apart as trained ones."""

    def one(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return (x - 0.005) * 100 if name.startswith("prompts") else x

    return jax.tree_util.tree_map_with_path(one, params)


def after_step(mesh, kind, network=None, **options):
    """Parameters after a step of `er` with the backbone frozen, and the loss."""
    frozen = ("patch_embed", "cls_token", "pos_embed", "block_0", "norm")
    prompts = SMALLEST[kind] | (network or {}).get("prompts", {})
    network = {"heads": 2, **(network or {}), "prompts": prompts}
    rig = Rig(mesh, make_strategy("er"), "vit", network=network, frozen=frozen, optimizer=optax.identity(), **options)
    state = rig.state(stored=False, task=np.int32(2))
    places = jax.tree.map(lambda x: x.sharding, state.params)
    state = dataclasses.replace(state, params=jax.device_put(large_prompts(jax.device_get(state.params)), places))
    before = jax.device_get(state.params)
    state = rig.stage(state, [make_draw(1)])
    state, metrics = rig.step(state, rig.rows(make_batch(0)))
    after, metrics = jax.device_get((state.params, metrics))
    for name in frozen:
        jax.tree.map(np.testing.assert_array_equal, before[name], after[name])
    assert all(np.any(before["prompts"][name] != x) for name, x in after["prompts"].items())
    return after, metrics["loss"]


@pytest.mark.parametrize("kind", SMALLEST)
def test_a_step_is_the_same_on_any_number_of_devices(kind, mesh_of):
    one = after_step(mesh_of(1), kind)
    close(one, after_step(mesh_of(8), kind), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SMALLEST)
def test_microbatches_recomputation_and_a_mesh_change_no_step(kind, mesh_of, mesh_of_shape):
    rows = {"prompts": {"batchwise": False} if kind == "l2p" else {}}
    one = after_step(mesh_of(1), kind, rows)
    close(one, after_step(mesh_of_shape(1, 2, 2), kind, rows | {"remat": True}, microbatches=2), rtol=1e-4, atol=1e-5)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "line"),
    [
        ("l2p", ": 'l2p' is not allowed, give a group of options"),
        ({"pool": 3}, ".kind: None is not allowed, give one of l2p, dualprompt"),
        ({"kind": "coda"}, ".kind: 'coda' is not allowed, give one of l2p, dualprompt"),
        (POOL | {"topk": 2}, ".topk: l2p has no such option, did you mean top_k?"),
        (POOL | {"width": 2}, ".width: l2p has no such option"),
        (POOL | {"top_k": 7}, ".top_k: 7 is not allowed, give at most pool = 6"),
        (POOL | {"blocks": (0, 3)}, ".blocks: (0, 3) is not allowed, give numbers below 3, the blocks of the network"),
        (POOL | {"blocks": [1, 1]}, ".blocks: (1, 1) is not allowed, give numbers of blocks, from 0, each once"),
        (POOL | {"pull": -1.0}, ".pull: -1.0 is not allowed, give 0 or more"),
        (POOL | {"read": "all"}, ".read: 'all' is not allowed, give one of prompts, token, both"),
        ({"kind": "dualprompt"}, ".expert_blocks: (2, 3, 4) is not allowed, give numbers below 3"),
        (EXPERTS | {"general_length": 0}, ".general_length: 0 is not allowed, give a positive int"),
    ],
)
def test_options_that_do_not_fit_are_one_line(prompts, line):
    with pytest.raises(UserError) as error:
        model_with(prompts)
    assert str(error.value).startswith(f"model.options.prompts{line}") and "\n" not in str(error.value)


def test_what_the_rest_is_told_of_the_model():
    batch, rows, experts, drawn = map(model_with, (POOL, ROWS, EXPERTS, EXPERTS | {"inherit": False}))
    assert [model.mixes for model in (batch, rows, experts)] == ["model.options.prompts.batchwise", "", ""]
    assert [model.reads for model in (batch, rows, experts)] == [False, False, True]
    assert [model.begin is None for model in (rows, experts, drawn)] == [True, False, True]
    with pytest.raises(UserError, match=r"^model.options: this network needs to know of rows"):
        jax.eval_shape(
            partial(experts.apply, backbone() | {"prompts": prompts_of("dualprompt/key")}, {}, train=True), IMAGE
        )


def test_a_network_with_prompts_is_not_cut_in_two():
    for layer in ("block_0", "features"):
        with pytest.raises(
            UserError, match=f"^latent.layer: '{layer}' is not allowed, give None with model.options.prompts"
        ):
            split(model_with(POOL), layer, (8, 8, 3))


def test_the_backbone_is_all_but_head_and_prompts():
    parts = list(jax.eval_shape(lambda: model_with(POOL).init(jax.random.key(0), (8, 8, 3)))["params"])
    found = parts_named("freeze", ("backbone",), parts)
    assert set(parts) - set(found) == {"head", "prompts"}


@pytest.mark.parametrize("seeds", [(), (2,)])
def test_an_expert_begins_as_that_of_the_task_before(seeds):
    expert = np.random.default_rng(0).normal(size=(*seeds, 2, 2, TASKS, 3, 2, 8)).astype(np.float32)
    params = {"prompts": {"expert": expert, "keys": 1}, "head": 2}
    found = model_with(EXPERTS).begin(params, 2)
    assert found["head"] == 2 and found["prompts"]["keys"] == 1
    for task, other in enumerate((0, 1, 1, 3)):
        np.testing.assert_array_equal(found["prompts"]["expert"][..., task, :, :, :], expert[..., other, :, :, :])
    assert with_still(model_with(EXPERTS), ("prompts",)).begin(params, 2)["prompts"] is params["prompts"]
    assert with_still(model_with(POOL), ("prompts",)).begin is None


# --- weights of a plain network ---------------------------------------------------------------------------------------


def timm_weights(seed=0, width=16, depth=2, classes=7, side=8):
    """Random weights by the names and in the shapes of timm's `vit_*`."""
    rng = np.random.default_rng(seed)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, (side // 4) ** 2 + 1, width)}
    layers = {"patch_embed.proj": (width, 3, 4, 4), "head": (classes, width)}
    norms = ["norm"]
    for i in range(depth):
        layers |= {f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width)}
        layers |= {f"blocks.{i}.mlp.fc1": (4 * width, width), f"blocks.{i}.mlp.fc2": (width, 4 * width)}
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return {name: (0.3 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def timm_logits(w, images, heads=2, depth=2):
    """What timm computes of images `[B, H, W, 3]`, in NumPy and float64."""
    w = {name: x.astype(np.float64) for name, x in w.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    rows, side = len(images), images.shape[1] // 4
    patches = images.reshape(rows, side, 4, side, 4, 3).transpose(0, 1, 3, 5, 2, 4).reshape(rows, side * side, -1)
    kernel = w["patch_embed.proj.weight"]
    x = patches @ kernel.reshape(len(kernel), -1).T + w["patch_embed.proj.bias"]
    x = np.concatenate([np.broadcast_to(w["cls_token"], (rows, 1, len(kernel))), x], 1) + w["pos_embed"]
    for i in range(depth):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").reshape(rows, x.shape[1], 3, heads, -1)
        query, key, value = qkv.transpose(2, 0, 3, 1, 4)
        scores = np.exp(query @ key.transpose(0, 1, 3, 2) / np.sqrt(query.shape[-1]))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ value
        x = x + linear(mixed.transpose(0, 2, 1, 3).reshape(x.shape), f"blocks.{i}.attn.proj")
        wide = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        wide = wide * (1 + special.erf(wide / np.sqrt(2))) / 2
        x = x + linear(wide, f"blocks.{i}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


def shapes_and_form(classes, **options):
    options = {"width": 16, "depth": 2, "heads": 2, "patch": 4, **options}
    model = make_model("vit", classes, options=options)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), (8, 8, 3)))
    return model, {name: x.shape for name, x in checkpoint.flatten(variables).items()}, variables


def test_timms_weights_give_timms_logits():
    weights, images = timm_weights(), np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)
    model, shapes, variables = shapes_and_form(7)
    loaded = init_from.fitted("F", "vit", shapes, weights)
    assert loaded.report["new"] == loaded.report["not_used"] == []
    filled = jax.tree.unflatten(jax.tree.structure(variables), [loaded.tensors[name] for name in shapes])
    found = jax.jit(partial(model.apply, train=False))(**filled, images=images)[0]["logits"]
    np.testing.assert_allclose(found, timm_logits(weights, images), rtol=1e-4, atol=1e-4)


def test_prompts_are_new_beside_weights_without_them():
    _, shapes, _ = shapes_and_form(7, prompts=POOL)
    loaded = init_from.fitted("F", "vit", shapes, timm_weights())
    prompts = ["params.prompts.keys", "params.prompts.pool"]
    assert loaded.report["new"] == prompts and loaded.report["not_used"] == []
    own = {**loaded.tensors, **{name: np.ones(shapes[name], np.float32) for name in prompts}}
    assert init_from.fitted("F", "vit", shapes, own).report["new"] == []  # of a run with prompts
    other = init_from.fitted("F", "vit", shapes, own | {prompts[1]: np.ones(3, np.float32)})
    assert other.report["new"] == prompts  # never the ones without the others
    plain = init_from.fitted("F", "vit", shapes_and_form(7)[1], own)
    assert plain.report["not_used"] == prompts
    with pytest.raises(UserError, match=r"F has nothing for blocks.2.attn.qkv.bias, where vit needs"):
        init_from.fitted("F", "vit", shapes_and_form(7, depth=3)[1], timm_weights())
    with pytest.raises(UserError, match=r"F has the shape \(5, 16\) for pos_embed, where vit needs \(17, 16\)"):
        init_from.fitted("F", "vit", shapes | {"params.pos_embed": (17, 16)}, timm_weights())
    with pytest.raises(UserError, match=r"F has the shape \(16, 16\) for blocks.0.attn.qkv.weight, where vit needs"):
        init_from.fitted("F", "vit", shapes | {"params.block_0.attn.query.kernel": (8, 2, 8)}, timm_weights())
