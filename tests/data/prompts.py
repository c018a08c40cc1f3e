"""Records what the authors' code of L2P and DualPrompt gives for small random weights, for tests/unit/test_prompts.py.

git clone https://github.com/google-research/l2p && git -C l2p checkout dd8836e6e372df29f03d83bf3dc3a806114e9d8e
PYTHONPATH=l2p python tests/data/prompts.py

Recorded with that commit, jax 0.10.2 and flax 0.12.8. The settings are those of its configs for CIFAR-100 but for sizes. The
file has images and their tasks; query, the features of the network without prompts; backbone/..., its weights by their names;
and of every case METHOD/CASE/..., the weights of the prompts and outputs.
"""

import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from models import vit

from configs import cifar100_dualprompt, cifar100_l2p

CLASSES, ROWS, TASKS = 5, 12, 4
SMALL = {"name": "small", "patches": {"size": (4, 4)}, "hidden_size": 16, "classifier": "token"}
SMALL |= {"transformer": {"mlp_dim": 64, "num_heads": 2, "num_layers": 3}, "representation_size": None}
SMALL["transformer"] |= {"attention_dropout_rate": 0.0, "dropout_rate": 0.0}
vit.MODEL_CONFIGS["small"] = ml_collections.ConfigDict(SMALL)
OUTPUTS = ("logits", "pre_logits", "prompt_idx", "reduce_sim")

rng = np.random.default_rng(0)
images = rng.normal(size=(ROWS, 8, 8, 3)).astype("f4")
tasks = rng.integers(0, TASKS, ROWS).astype("i4")
found: dict[str, np.ndarray] = {"images": images, "tasks": tasks}


def random_weights(shapes, known=None):
    """Weights of these shapes, large enough that every row is another one's; those known as they are."""
    known = known or {}

    def one(path, x):
        values = rng.normal(size=x.shape) * (0.3 if len(x.shape) > 1 else 0.1) + (path[-1] == "scale")
        return known.get(path, values.astype("f4"))

    return {path: one(path, x) for path, x in flatten_dict(shapes).items()}


def small(config, pool, **more):
    """One of their configs with small sizes."""
    config.prompt_pool_param.update(pool)
    config.update({"num_tasks": TASKS, **more})
    return config


def network(config):
    return vit.create_model("small", config)[0](num_classes=CLASSES, train=False)


plain = vit.create_original_vit("small")[0](num_classes=CLASSES, train=False)
backbone = random_weights(jax.eval_shape(plain.init, jax.random.key(0), images)["params"])
found |= {"/".join(("backbone", *path)): x for path, x in backbone.items()}
found["query"] = query = plain.apply({"params": unflatten_dict(backbone)}, images)["pre_logits"]

POOL = {"pool_size": 6, "length": 2, "top_k": 3}
L2P = {
    "batch": {},
    "rows": {"batchwise_prompt": False},
    "token": {"vit_classifier": "token"},
    "both": {"vit_classifier": "token+prompt"},
    "layers": {"batchwise_prompt": False, "e_prompt_layer_idx": [0, 2]},
}
EXPERTS = {"pool_size": TASKS, "length": 3, "batchwise_prompt": False}
BLOCKS = {"g_prompt_length": 2, "g_prompt_layer_idx": [0, 1], "e_prompt_layer_idx": [1, 2]}
DUAL = {"task": BLOCKS, "key": BLOCKS}

for method, make, cases in (("l2p", cifar100_l2p, L2P), ("dualprompt", cifar100_dualprompt, DUAL)):
    for case, changes in cases.items():
        changes = dict(changes)
        pool = dict(POOL if method == "l2p" else EXPERTS)
        if "batchwise_prompt" in changes:
            pool["batchwise_prompt"] = changes.pop("batchwise_prompt")
        model = network(small(make.get_config(), pool, **changes))
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        params = random_weights(shapes, backbone)
        given = {"cls_features": query}
        if method == "dualprompt" and case == "task":  # as in training, where a batch is of one task
            given["prompt_mask"] = jnp.asarray(tasks)[:, None]
        outputs = model.apply({"params": unflatten_dict(params)}, images, **given)
        place = f"{method}/{case}"
        found |= {"/".join((place, *path)): x for path, x in params.items() if path not in backbone}
        found |= {f"{place}/{name}": outputs[name] for name in OUTPUTS}

np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **{name: np.asarray(x) for name, x in found.items()})
