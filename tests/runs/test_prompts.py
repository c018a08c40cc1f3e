"""Whole runs with prompts: a plain network's weights below them stay to the bit, what a task begins with, what is refused."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxcl.models import make_model
from jaxcl.runs import checkpoint
from jaxcl.training import init_from, loop
from tests.whole import small

TINY = {"width": 8, "depth": 2, "heads": 2, "patch": 4}
KINDS = {
    "l2p": {"kind": "l2p", "pool": 3, "length": 2, "top_k": 2},
    "dualprompt": {"kind": "dualprompt", "general_length": 2, "general_blocks": (0,), "expert_blocks": (1,)},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a plain network's weights."""
    variables = make_model("vit", 10, options=TINY).init(jax.random.key(3), (8, 8, 1))
    file = tmp_path_factory.mktemp("weights") / "plain.safetensors"
    save_file({name: np.asarray(x) for name, x in checkpoint.flatten(variables).items()}, file)
    return file


def config_of(kind, file, **changes):
    config = small(**{"strategy": "incremental", "freeze": ("backbone",), "data__loss_classes": "task", **changes})
    with config.unlocked():
        config.model.name = "vit"
        config.model.options = TINY | {"prompts": KINDS[kind]}
        config.model.init_from = str(file)
    return config


def drawn_prompts(config, kind):
    """What the run of a config begins with."""
    model = make_model("vit", 10, options=TINY | {"prompts": KINDS[kind]}, classes=np.ones((3, 10), bool))
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    return jax.device_get(model.init(key, (8, 8, 1))["params"]["prompts"])


@pytest.mark.parametrize(("kind", "strategy"), [("l2p", "incremental"), ("dualprompt", "er")])
def test_the_backbone_stays_to_the_bit_and_prompts_learn(kind, strategy, weights, tmp_path):
    config = config_of(kind, weights, strategy=strategy)
    result = loop.train_and_evaluate(config, tmp_path, devices=jax.devices()[:2], progress=False)
    new = {name.split(".")[1] for name in result["init_from"]["new"]}
    assert new == {"prompts"}
    before, after = init_from.found_in(str(weights)), init_from.found_in(str(tmp_path))
    for name, x in before.items():
        assert np.array_equal(x, after[name]) == (not name.startswith("params.head.")), name
    drawn = drawn_prompts(config, kind)
    for name, x in drawn.items():
        assert not np.array_equal(x, after[f"params.prompts.{name}"]), name
    if kind == "dualprompt":  # a task's expert begins as that of the task before
        apart = [np.abs(np.diff(x, axis=2)).mean() for x in (drawn["expert"], after["params.prompts.expert"])]
        print(apart, np.abs(after["params.prompts.expert"] - drawn["expert"]).mean((0, 1, 3, 4, 5)))
    again = loop.train_and_evaluate(config, tmp_path, devices=jax.devices()[:2], progress=False)
    assert again == result
