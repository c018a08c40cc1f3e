"""A Flax network of one's own, named in a config, trained on the digits, loaded and asked.

    python -m examples.own_model

The module is called as `module(images, train=..., mask=...)` with images float32 `[B, H, W, C]` and gives logits and features.
Its fields that have a default are options: `config.model.options`.
"""

import pathlib
import tempfile

import flax.linen as nn
import jax
import numpy as np

import jaxcl
from jaxcl import shipped
from jaxcl.data import open_source
from jaxcl.mesh import use_fake_devices
from jaxcl.training.trained import Trained


class Small(nn.Module):
    """Two convolutions and a layer."""

    num_classes: int
    width: int = 16

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: jax.Array | None = None) -> dict[str, jax.Array]:
        del train, mask  # no dropout, and no norm over the batch
        x = nn.relu(nn.Conv(self.width, (3, 3))(images))
        x = nn.relu(nn.Conv(2 * self.width, (3, 3), strides=2)(x))
        features = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return {"logits": nn.Dense(self.num_classes, name="head")(features), "features": features}


def main(folder: pathlib.Path) -> Trained:
    """The trained network."""
    config = shipped.load("digits").get_config()
    config.model.name = "examples.own_model:Small"
    config.model.options = {"width": 8}
    config.epochs = 4
    jaxcl.train_and_evaluate(config, folder, progress=False)
    return jaxcl.load(folder)


if __name__ == "__main__":
    use_fake_devices(8)
    with tempfile.TemporaryDirectory() as root:
        model = main(pathlib.Path(root))
        test = open_source("digits")[1]
        probabilities = model.predict(test.read(np.arange(len(test))))
    accuracy = float(np.mean(probabilities.argmax(axis=1) == test.labels))
    print(f"accuracy over all tasks: {accuracy:.2f}, of {model.class_names}")
    assert accuracy > 0.8
