"""A strategy of one's own, named in a config: here rehearsal whose replayed rows weigh as much as the classes they stand for.

    python -m examples.own_strategy

Trains it on the digits, on 8 fake devices, beside plain rehearsal. On the command line the same is

    jaxcl train --config=digits --config.strategy=examples.own_strategy:weighted --workdir=DIR
"""

import pathlib
import tempfile
from collections.abc import Sequence

import jax.numpy as jnp

import jaxcl
from jaxcl import shipped
from jaxcl.mesh import use_fake_devices
from jaxcl.strategies import Context, Part, Share, Strategy
from jaxcl.strategies.base import cross_entropy, mean
from jaxcl.types import PyTree


def weighted(most: float = 4.0) -> Strategy:
    """The options of a strategy are the parameters of its function: `config.strategies.weighted.most`."""

    def loss(params: PyTree, parts: Sequence[Part], context: Context) -> Share:
        new, replayed = parts  # the rows of the batch, and those drawn from the buffer; on this device
        weight = jnp.minimum(jnp.sum(context.old) / jnp.sum(context.present), most)
        of_new, of_replayed = (mean(cross_entropy(part), part.valid) for part in (new, replayed))
        return Share((of_new + weight * of_replayed) / (1 + weight))

    return Strategy(draws=1, loss=loss)


def main(strategy: str, folder: pathlib.Path) -> float:
    """Average accuracy over all tasks."""
    config = shipped.load("digits").get_config()
    config.strategy, config.epochs = strategy, 6
    return jaxcl.train_and_evaluate(config, folder, progress=False)["average_accuracy"]


if __name__ == "__main__":
    use_fake_devices(8)
    with tempfile.TemporaryDirectory() as root:
        mine, theirs = (main(name, pathlib.Path(root, name)) for name in ("examples.own_strategy:weighted", "er"))
    print(f"accuracy over all tasks: {mine:.2f} with the strategy of this file, {theirs:.2f} with er")
    assert mine > 0.85
