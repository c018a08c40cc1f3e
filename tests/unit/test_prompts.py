"""Prompts of a Vision Transformer: the authors' forward pass, the same step on any number of devices, gradients, options."""

import pathlib
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from jaxcl.errors import UserError
from jaxcl.models import RowFacts, make_model, parts_named
from jaxcl.pretrained import read as files
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
    state = rig.state(stored=False)
    state = rig.state(stored=False, params=large_prompts(jax.device_get(state.params)), task=np.int32(2))
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
