"""Whole runs with prompts: a plain network's weights below them stay to the bit, prompts and head learn."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxcl.runs import checkpoint
from jaxcl.training import init_from, loop
from jaxcl.training.network import model_of
from tests.whole import small

TINY = {"width": 8, "depth": 1, "heads": 2, "patch": 4}
KINDS = {
    "l2p": {"kind": "l2p", "pool": 3, "length": 2, "top_k": 2},
    "dualprompt": {"kind": "dualprompt", "general_length": 2, "general_blocks": (0,), "expert_blocks": (0,)},
}
CLASSES = np.ones((3, 10), bool)


def config_of(strategy, **options):
    config = small(strategy=strategy, freeze=("backbone",), data__loss_classes="task", batch_size=64)
    with config.unlocked():
        config.model.name, config.model.options = "vit", TINY | options
    return config


def plain_weights(file):
    """Random weights of the network without prompts, written to a file."""
    variables = jax.eval_shape(lambda: model_of(config_of("er"), 10, CLASSES).init(jax.random.key(0), (8, 8, 1)))
    rng = np.random.default_rng(0)
    flat = checkpoint.flatten(variables)
    save_file({name: rng.normal(0, 0.3, x.shape).astype(np.float32) for name, x in flat.items()}, file)
    return str(file)


@pytest.mark.parametrize(("kind", "strategy"), [("l2p", "incremental"), ("dualprompt", "er")])
def test_the_backbone_stays_to_the_bit_and_prompts_learn(kind, strategy, tmp_path):
    config = config_of(strategy, prompts=KINDS[kind])
    config.model.init_from = plain_weights(tmp_path / "plain.safetensors")
    result = loop.train_and_evaluate(config, tmp_path / "run", devices=jax.devices()[:2], progress=False)
    assert {name.split(".")[1] for name in result["init_from"]["new"]} == {"prompts"}
    before, after = init_from.found_in(config.model.init_from), init_from.found_in(str(tmp_path / "run"))
    for name, x in before.items():
        assert np.array_equal(x, after[name]) == (not name.startswith("params.head.")), name
    learnt = {name: after[name] for name in after.keys() - before.keys()}
    assert learnt and all(x.min() < 0 or x.max() >= 0.01 for x in learnt.values())  # where they are drawn from
    if kind == "dualprompt":  # a task's expert begins as that of the task before, and keeps what is random of it
        experts = np.moveaxis(learnt["params.prompts.expert"], 2, 0).reshape(3, -1)
        assert np.corrcoef(experts).min() > 0.5
