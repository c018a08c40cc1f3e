"""One of each, from a module that jaxcl does not know: named in a config as `module:name`, or registered under its own name."""

import importlib
import json

import jax
import numpy as np
import pytest

from jaxcl.buffer import EXCHANGES, POLICIES
from jaxcl.data import AUGMENTATIONS, SCENARIOS, SOURCES
from jaxcl.errors import UserError
from jaxcl.metrics import METRICS
from jaxcl.models import MODELS
from jaxcl.strategies import STRATEGIES
from jaxcl.training.config import default_config
from jaxcl.training.loop import train_and_evaluate
from tests import whole

MODULE = '''
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxcl.buffer.exchange.mix import mix
from jaxcl.buffer.policy.reservoir import reservoir
from jaxcl.data import array_source
from jaxcl.data.scenarios import Scenario, Task
from jaxcl.strategies.base import Share, Strategy, cross_entropy, mean


def my_strategy(weight=2.0):
    def loss(params, parts, context):
        new, replay = parts
        return Share(mean(cross_entropy(new), new.valid) + weight * mean(cross_entropy(replay), replay.valid))

    return Strategy(draws=1, loss=loss)


def my_policy(budget):
    return reservoir(budget)


def my_exchange(per_device, shards, axis):
    return mix(per_device, shards, axis)[-1:]


class my_model(nn.Module):
    num_classes: int
    width: int = 8

    @nn.compact
    def __call__(self, images, *, train, mask=None):
        features = nn.relu(nn.Dense(self.width)(images.reshape(len(images), -1)))
        return {"logits": nn.Dense(self.num_classes)(features), "features": features}


def my_source(*, rest, **_):
    rng, rows = np.random.default_rng(0), int(rest)
    labels = np.arange(rows) % 4
    images = (60 * labels[:, None, None, None] + rng.integers(0, 40, (rows, 4, 4, 1))).astype(np.uint8)
    return (array_source(images, labels, list("abcd")),) * 2


def my_scenario(split):
    """Odd rows after even ones."""
    rows = np.arange(len(split.train))
    tasks = [Task(t, (0, 1, 2, 3), rows[t::2], rows[t::2]) for t in (0, 1)]
    return Scenario(tuple(tasks), 4), split.train, split.test


def my_metric(rows):
    """How far the right class is ahead of the mean."""
    right = jnp.take_along_axis(rows.scores, rows.label[:, None], axis=1)[:, 0]
    return right - rows.scores.mean(axis=1)


def my_augmentation(key, image):
    return image[::-1]
'''
FIELDS = {
    "strategy": "my_strategy",
    "buffer.policy": "my_policy",
    "buffer.exchange": "my_exchange",
    "model.name": "my_model",
    "data.source": "my_source",
    "data.scenario": "my_scenario",
    "eval.metrics": ("my_metric",),
    "data.augment": ("my_augmentation",),
}
REGISTRIES = dict(
    zip(FIELDS, (STRATEGIES, POLICIES, EXCHANGES, MODELS, SOURCES, SCENARIOS, METRICS, AUGMENTATIONS), strict=True)
)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Its name, importable."""
    name = f"of_a_user_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def config_of(prefix=""):
    config = default_config()
    named = {f: prefix + x if isinstance(x, str) else tuple(prefix + name for name in x) for f, x in FIELDS.items()}
    named["data.source"] += ":64"
    config.update_from_flattened_dict(named)
    config.batch_size, config.eval.batch_size, config.epochs = 16, 64, 2
    config.buffer.capacity, config.buffer.representatives, config.buffer.candidates = 16, 8, 8
    config.model.options = {"width": 6}
    with config.unlocked():
        config.strategies.my_strategy = {"weight": 3.0}
    return config


def check_result(folder, result):
    assert np.shape(result["my_metric_matrix"]) == (2, 2) and np.shape(result["accuracy_matrix"]) == (2, 2)
    (line, *_) = whole.lines(folder, "evaluation")
    assert line["my_metric"] == result["my_metric_matrix"][0]
    assert result["buffer"]["rows"] == 16
    arrays = whole.last(folder)[1]
    assert arrays["params.Dense_0.kernel"].shape == (16, 6)  # my_source's pixels, my_model's option


def test_one_of_each(module, tmp_path, monkeypatch, mesh_of):
    """The same run twice: named in the config, and registered under their own names."""
    config = config_of(f"{module}:")
    result = train_and_evaluate(config, tmp_path / "named", devices=jax.devices()[:2], progress=False)
    check_result(tmp_path / "named", result)
    mine = importlib.import_module(module)
    for field, registry in REGISTRIES.items():
        monkeypatch.setattr(registry, "_found", dict(registry._found))
        name = FIELDS[field] if isinstance(FIELDS[field], str) else FIELDS[field][0]
        registry.register(getattr(mine, name))
    again = train_and_evaluate(config_of(), tmp_path / "registered", devices=jax.devices()[:2], progress=False)
    check_result(tmp_path / "registered", again)
    assert again["accuracy_matrix"] == result["accuracy_matrix"]
    assert json.dumps(again["my_metric_matrix"]) == json.dumps(result["my_metric_matrix"])


@pytest.mark.parametrize("field", FIELDS)
def test_one_that_is_not_there_is_one_line(field, module, tmp_path):
    config = config_of(f"{module}:")
    if field == "strategy":  # whose options are known by its name
        del config.strategies.my_strategy
    wrong = f"{module}:absent"
    config.update_from_flattened_dict({field: (wrong,) if isinstance(FIELDS[field], tuple) else wrong})
    with pytest.raises(UserError) as caught:
        train_and_evaluate(config, tmp_path / "run", devices=jax.devices()[:1], progress=False)
    assert str(caught.value).startswith(f"{field}: ") and "absent" in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
