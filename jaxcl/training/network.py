"""The network of a run, put together from its config: the weights it begins with, the parts that stay, the rate of each part.

Where a run trains on the activations of a layer (`latent.layer`), its network is what lies above that layer, and its rows are
what lies below gives for the images.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxcl import data
from jaxcl.data.augment import Augment, Normalize
from jaxcl.errors import UserError
from jaxcl.memory import free_memory
from jaxcl.mesh import AXIS
from jaxcl.models import (
    Halves,
    Model,
    dense_layers,
    is_own,
    joining,
    make_model,
    parts_named,
    scale_of_parts,
    split,
    with_still,
)
from jaxcl.strategies import Strategy
from jaxcl.training import init_from
from jaxcl.training.latents import Activations, Below, Codec, digest_of, remembering, whole_model
from jaxcl.training.sizes import check_memory
from jaxcl.types import PyTree


@dataclasses.dataclass(frozen=True)
class Network:
    """What a run trains, and the rows on which it does.

    Attributes:
      model: its `init` wants `image_shape`.
      image_shape: (H, W, C) of images as the whole network reads them.
      train, test: the rows; of images, or of activations.
      augment, normalize: rows as the sources give them to what the model reads, see `jaxcl.data.augment`.
      frozen: parts that no step changes.
      scales: of the learning rate, by part; those that are not named have 1.
      loaded: the weights to begin with; None: random ones.
      activations: of train and test rows; () where the rows are images.
      codec: of the activations that the memory holds where the rows are images, and the model reads both; None: of its rows.
      about: what result.json says of the network beside its name.
    """

    model: Model
    image_shape: tuple[int, int, int]
    train: data.Source
    test: data.Source
    augment: Augment
    normalize: Normalize
    frozen: tuple[str, ...]
    scales: Mapping[str, float]
    loaded: init_from.Loaded | None
    activations: tuple[Activations, ...] = ()
    codec: Codec | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def prepare(self) -> None:
        """Computes activations, where they are the rows."""
        for one in self.activations:
            one.prepare()

    def report(self) -> dict[str, Any]:
        """What result.json says of it."""
        found: dict[str, Any] = {} if self.loaded is None else {"init_from": self.loaded.report}
        if self.about:
            found["latent"] = dict(self.about)
        if self.activations:
            errors = {name: one.error for name, one in zip(("train", "test"), self.activations, strict=True)}
            found["latent"]["relative_error"] = errors
        return found


def make_network(config: ConfigDict, mesh: Mesh, train: data.Source, test: data.Source, classes: np.ndarray) -> Network:
    """The network for these rows of images; `classes` bool `[T, K]` are those of each task.

    Raises:
      UserError: an option of the model, a part that is named, the file of its weights or the layer is not allowed.
    """
    d = config.data
    shape = data.scaled_shape(train.image_shape, d.resize)
    images: Any = {"mean": d.mean, "std": d.std, "side": d.resize}
    augment = data.make_augment(d.augment, train.image_shape, **images)
    normalize = data.make_normalize(train.image_shape, **images)
    model = model_of(config, train.num_classes, classes)
    parts = parts_of(model, shape) if config.freeze or config.optimizer.scales else ()
    frozen = tuple(parts_named("freeze", config.freeze, parts))
    scales = scale_of_parts("optimizer.scales", config.optimizer.scales, parts)
    loaded = init_from.load(config, model, shape)
    network = Network(model, shape, train, test, augment, normalize, frozen, scales, loaded)
    if config.latent.layer is not None:
        if train.targets:
            raise UserError("latent.layer: not allowed where images are to be reconstructed, give None")
        network = joined_at(config, network) if is_slow(config) else on_activations(config, mesh, network)
    return dataclasses.replace(network, model=with_still(network.model, network.frozen))


def on_activations(config: ConfigDict, mesh: Mesh, whole: Network) -> Network:
    """What of the network lies above `latent.layer`, on the activations of its rows.

    Raises:
      UserError: there is no such layer, or the activations do not fit into memory.
    """
    halves, codec = halves_of(config, whole.model, whole.image_shape)
    assert whole.loaded is not None
    tensors, sources = whole.loaded.tensors, (whole.train, whole.test)
    if new := [part for part in halves.below if is_own(part)]:
        raise UserError(
            f"latent.layer: {new[0]}, below it, is not in the file of model.init_from; choose a layer further below"
        )
    size = int(np.prod(codec.row_shape))
    check_memory({"latent.layer": (config.latent.layer, size * sum(map(len, sources)))}, free_memory())
    below = Below(
        halves.lower,
        weights_of(whole.model, whole.image_shape, tensors),
        whole.augment,
        whole.normalize,
        codec,
        digest_of(config, tensors, halves.below),
        config.latent.cache,
        config.eval.batch_size,
        tuple(mesh.local_devices),
    )
    activations = tuple(Activations(source, below.of, codec) for source in sources)
    about = {"layer": config.latent.layer, "dtype": codec.dtype, "views": codec.views, "shape": list(codec.shape)}
    return dataclasses.replace(
        whole,
        model=halves.upper,
        train=activations[0].source,
        test=activations[1].source,
        augment=codec.drawn,
        normalize=codec.plain,
        frozen=tuple(dict.fromkeys((*halves.below, *whole.frozen))),
        activations=activations,
        about=about | {"bytes_per_row": size, "frozen": list(halves.below)},
    )


def is_slow(config: ConfigDict) -> bool:
    """Whether what lies below `latent.layer` learns; `config` may be of an earlier version."""
    return config.latent.get("below", "frozen") == "slow"


def joined_at(config: ConfigDict, whole: Network) -> Network:
    """The network that new rows enter as images and rows of the memory at `latent.layer`.

    Raises:
      UserError: there is no such layer, or a part below it has no rate of its own.
    """
    model, halves = joining(whole.model, config.latent.layer, whole.image_shape)
    learns = [name for name in halves.below if name not in whole.frozen]
    if without := [name for name in learns if name not in whole.scales]:
        raise UserError(
            f"optimizer.scales: none for {', '.join(without)}, which latent.below = slow needs; give a number for each part"
        )
    codec = Codec(halves.shape, config.latent.dtype)
    about = {"layer": config.latent.layer, "dtype": codec.dtype, "shape": list(codec.shape)}
    about |= {"bytes_per_row": codec.row_shape[-1], "slow": {name: whole.scales[name] for name in learns}}
    return dataclasses.replace(whole, model=model, codec=codec, about=about)


def halves_of(config: ConfigDict, model: Model, image_shape: tuple[int, int, int]) -> tuple[Halves, Codec]:
    """The network below and above `latent.layer`, and how what passes between them is stored."""
    halves = split(model, config.latent.layer, image_shape)
    return halves, Codec(halves.shape, config.latent.dtype, config.latent.views)


def weights_of(
    model: Model, image_shape: tuple[int, int, int], tensors: Mapping[str, np.ndarray]
) -> tuple[PyTree, PyTree]:
    """Params and batch_stats of these tensors, by their path; zeros where there is none, as of a new head."""
    variables = jax.eval_shape(lambda key: model.init(key, image_shape), jax.random.key(0))

    def filled(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return tensors[name] if name in tensors else np.zeros(x.shape, x.dtype)

    found = jax.tree_util.tree_map_with_path(filled, variables)
    return found["params"], found["batch_stats"]


def model_of(config: ConfigDict, num_classes: int, classes: np.ndarray) -> Model:
    """The model that the config names, from images."""
    m = config.model
    options = m.options.to_dict()
    return make_model(m.name, num_classes, options=options, dtype=m.dtype, axis_name=AXIS, classes=classes)


def evaluated_model(config: ConfigDict, model: Model, image_shape: tuple[int, int, int]) -> Model:
    """As `model_of`, of a run on activations with what storing them does to them."""
    if config.get("latent", {}).get("layer") is None or is_slow(config):
        return model
    return whole_model(model, *halves_of(config, model, image_shape))


def frozen_of(config: ConfigDict, model: Model, image_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """The parts of the model that no step changes."""
    frozen = parts_named("freeze", config.freeze, parts_of(model, image_shape)) if config.get("freeze") else []
    below: tuple[str, ...] = ()
    if config.get("latent", {}).get("layer") is not None and not is_slow(config):
        below = split(model, config.latent.layer, image_shape).below
    return tuple(dict.fromkeys((*below, *frozen)))


def fitted(strategy: Strategy, network: Network) -> Strategy:
    """The strategy for this network, and for what the memory holds of its rows.

    Raises:
      UserError: the network is not what it needs.
    """
    if strategy.fit is not None:
        row = jax.eval_shape(network.normalize, jax.ShapeDtypeStruct((1, *network.train.image_shape), np.uint8))
        strategy = strategy.fit(dense_layers(network.model, network.image_shape, network.frozen, row.shape[1:]))
    return strategy if network.codec is None else remembering(strategy, network.codec)


def fitted_to(strategy: Strategy, config: ConfigDict, model: Model, image_shape: tuple[int, int, int]) -> Strategy:
    """The same for the model from images of a run with this config."""
    return (
        strategy
        if strategy.fit is None
        else strategy.fit(dense_layers(model, image_shape, frozen_of(config, model, image_shape)))
    )


def parts_of(model: Model, image_shape: tuple[int, int, int]) -> Sequence[str]:
    """The names of its parts."""
    return list(jax.eval_shape(lambda key: model.init(key, image_shape)["params"], jax.random.key(0)))
