"""Whether data, model and strategy of a run go together, told from shapes alone; and the shapes of what it stores."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxcl import data
from jaxcl.check import refused
from jaxcl.errors import UserError
from jaxcl.mesh import WHOLE, over_mesh, row_shards
from jaxcl.models import RowFacts
from jaxcl.strategies import STRATEGIES, Strategy, make_strategy
from jaxcl.training.config import means_asked
from jaxcl.training.network import Network
from jaxcl.types import PyTree


def stored_row(network: Network, strategy: Strategy, source: data.Source) -> PyTree:
    """Shapes and dtypes of what the strategy stores of one row."""

    def stored(image: jax.Array, target: dict[str, jax.Array]) -> PyTree:
        return strategy.stored(image, outputs_of(network, image) if strategy.stores_outputs else {}, target)

    target = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in source.targets.items()}
    rows = jax.eval_shape(stored, jax.ShapeDtypeStruct((1, *source.image_shape), np.uint8), target)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)


def outputs_of(network: Network, image: jax.Array) -> dict[str, jax.Array]:
    """What a new model makes of images, for the shapes."""
    variables = network.model.init(jax.random.key(0), network.image_shape)
    return network.model.apply(**variables, images=network.normalize(image), train=False)[0]


def check_objective(config: ConfigDict, strategy: Strategy, network: Network, source: data.Source) -> None:
    """Whether data, model and strategy are all for classification or all for reconstruction, and there is what they read.

    Raises:
      UserError: they are not.
    """
    image, model = jax.ShapeDtypeStruct((1, *source.image_shape), np.uint8), network.model
    made = {name: x.shape[1:] for name, x in jax.eval_shape(functools.partial(outputs_of, network), image).items()}
    wanted = {name: x.shape[1:] for name, x in source.targets.items()}
    if not wanted and "logits" not in made:
        raise UserError(f"model.name: {model.name} reconstructs {', '.join(made)}, which {config.data.source} has not")
    if any(made.get(name) != shape for name, shape in wanted.items()):
        raise UserError(f"model.name: {model.name} does not reconstruct the {wanted} of {config.data.source}")
    if wanted and strategy.classifies:
        allowed = [name for name in STRATEGIES if not make_strategy(name).classifies]
        raise UserError(
            f"strategy: {config.strategy} classifies, {config.data.source} is to be reconstructed; choose one of "
            f"{', '.join(allowed)}"
        )
    if config.model.options.get("batchformer", 0) and (wanted or strategy.own_bias):
        why = "reconstructs" if wanted else strategy.own_bias
        raise refused("model.options.batchformer", config.model.options.batchformer, f"0: {config.strategy} {why}")
    if wanted and config.data.augment:
        raise UserError(
            f"data.augment: {tuple(config.data.augment)} is not allowed where images are to be reconstructed, give ()"
        )
    asked = means_asked(config)
    if asked and (wanted or "features" not in made):
        raise refused("eval.metrics", asked[0], f"one that needs no features: there are {', '.join(made)}")
    if strategy.head:
        params = jax.eval_shape(lambda key: model.init(key, network.image_shape)["params"], jax.random.key(0))
        kernel = params["head"].get("kernel") if isinstance(params.get("head"), Mapping) else None
        if kernel is None or kernel.shape != (*made.get("features", ()), source.num_classes):
            raise UserError(
                f"strategy: {config.strategy} reads the weights of a linear head on the features, which the model "
                f"{config.model.name} has not; choose another model.name"
            )


def check_apart(config: ConfigDict, mesh: Mesh, network: Network) -> None:
    """Whether rows do not meet in the model, where a device takes them in parts (`microbatches`) or the gradients of several
    are compared (`optimizer.noise_scale`).

    Raises:
      UserError: a norm that is trained keeps statistics of the batch, or the model gives something of all rows together.
    """
    count, noise, model = config.microbatches, config.optimizer.noise_scale, network.model
    if count == 1 and not noise:
        return
    variables = jax.eval_shape(lambda key: model.init(key, network.image_shape), jax.random.key(0))
    of_rows = any(name not in network.frozen for name in variables["batch_stats"])
    if noise and of_rows and model.meets is not None and model.meets(config.batch_size, row_shards(mesh)):
        norm = f"model.options.norm = {config.model.options.norm}"
        raise refused("optimizer.noise_scale", True, f"False with {norm}, in which rows of several devices meet")
    if noise and model.mixes:
        raise refused("optimizer.noise_scale", True, f"False with {model.mixes}, by which rows of several devices meet")
    if count == 1:
        return
    if of_rows:
        raise refused("microbatches", count, f"1 with {model.name}, whose batch norm mixes rows")
    if model.mixes:
        raise refused("microbatches", count, f"1 with {model.mixes}, which mixes rows")

    def trained(params: PyTree, batch_stats: PyTree, images: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
        number = valid.astype(jnp.int32)
        facts = RowFacts(valid, number, valid, number, number, number[0], config.batch_size) if model.reads else valid
        return model.apply(params, batch_stats, network.normalize(images), train=True, mask=facts)[0]

    rows = jax.ShapeDtypeStruct((3, *network.train.image_shape), np.uint8), jax.ShapeDtypeStruct((3,), np.bool_)
    found = jax.eval_shape(over_mesh(mesh, trained, WHOLE, WHOLE), variables["params"], variables["batch_stats"], *rows)
    for name, x in found.items():
        if x.shape[:1] != (3,):
            raise refused("microbatches", count, f"1 with {model.name}, which gives {name} of all rows together")
