"""A network that a run has trained, to be used: `jaxcl.load(workdir)`."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from ml_collections import ConfigDict

from jaxcl import mesh as mesh_lib
from jaxcl.check import refused
from jaxcl.data import make_normalize, scaled_shape
from jaxcl.errors import StorageError, UserError
from jaxcl.mesh import ROWS, WHOLE, on_mesh
from jaxcl.models import Model
from jaxcl.runs import checkpoint, files, workdir
from jaxcl.sealed import Damaged
from jaxcl.strategies import Strategy
from jaxcl.training import weights as weights_lib
from jaxcl.training.build import strategy_of
from jaxcl.training.network import evaluated_model, fitted_to, model_of
from jaxcl.training.state import Weights
from jaxcl.types import PyTree

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # of an exported program
_log = logging.getLogger("jaxcl")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trained:
    """A network with its weights, and the strategy by whose scores it was evaluated.

    Attributes:
      config: of the run.
      class_names: K names, in the order of the probabilities.
      image_shape: (H, W, C) of the images that it reads.
      step: steps that were taken.
      model, strategy: by which it answers.
      weights: NumPy arrays.
      mesh: the devices on which it answers.
    """

    config: ConfigDict
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    step: int
    model: Model
    strategy: Strategy
    weights: Weights
    mesh: jax.sharding.Mesh

    def __repr__(self) -> str:
        images = "x".join(map(str, self.image_shape))
        network = f"{self.model.name} by {self.config.strategy}"
        return f"Trained({network}, {len(self.class_names)} classes, images {images}, step {self.step})"

    def predict(self, images: np.ndarray) -> Any:
        """Probabilities of the classes, float32 `[n, K]`: the softmax of the scores by which evaluation ranks them, so the
        likeliest class is the one that evaluation takes.

        Of a network that reconstructs, what it makes of the images: float32 `[n, ...]` by name.

        Args:
          images: uint8 `[n, H, W, C]`, or `[n, H, W]` of one channel; not normalised.

        Raises:
          UserError: they are not.
        """
        found = self._answers(images)
        return found.get("probabilities", found)

    def features(self, images: np.ndarray) -> np.ndarray:
        """The input of the network's head, float32 `[n, D]`; arguments and errors as of `predict`."""
        found = self._answers(images)
        if "features" not in found:
            raise UserError(f"model.name: {self.config.model.name} has no features, but {', '.join(found)}")
        return found["features"]

    def export(self, path: str | pathlib.Path) -> None:
        """Writes the program of `predict` with its weights, for any number of images, as StableHLO (`jax.export`): what
        `jax.export.deserialize(bytes).call(images)` runs without jaxcl, on CPU, GPU or TPU.

        Raises:
          StorageError: the file cannot be written.
        """
        symbolic = jax_export.symbolic_shape("b")
        images = jax.ShapeDtypeStruct((*symbolic, *self.image_shape), np.uint8)

        def answer(image: jax.Array) -> PyTree:
            found = self._program(jax.tree.map(jnp.asarray, self.weights), image[None])
            return jax.tree.map(lambda x: x[0], found.get("probabilities", found))

        # Row by row, as a network may ask for the length of its batch, which is a number here for one row alone.
        program = jax.jit(jax.vmap(answer))
        content = jax_export.export(program, platforms=PLATFORMS)(images).serialize()
        try:
            files.write_whole(pathlib.Path(path), bytes(content))
        except OSError as error:
            raise StorageError(f"export: {path} cannot be written: {error.strerror}") from error

    def _program(self, weights: Weights, images: jax.Array) -> dict[str, jax.Array]:
        """images uint8 `[b, H, W, C]` -> what there is to tell of each."""
        d = self.config.data
        normalize = make_normalize(self.image_shape, mean=d.mean, std=d.std, side=d.get("resize"))
        outputs = self.model.apply(weights.params, weights.batch_stats, normalize(images), train=False)[0]
        if "logits" not in outputs:
            return outputs
        scores = self.strategy.scores(outputs, weights.strategy_state).astype(jnp.float32)
        return {"probabilities": jax.nn.softmax(scores), "features": outputs["features"]}

    @functools.cached_property
    def _compiled(self) -> Any:
        return on_mesh(self.mesh, self._program, (WHOLE, ROWS), ROWS)

    @functools.cached_property
    def _placed(self) -> Weights:
        return mesh_lib.replicate(self.mesh, self.weights)

    def _answers(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Of all images, batch after batch; the last one is filled up."""
        images = np.asarray(images)
        if images.ndim == 3 and self.image_shape[2] == 1:
            images = images[..., None]
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape or images.ndim != 4:
            shape = ", ".join(map(str, self.image_shape))
            raise UserError(f"images: {images.dtype} {images.shape} is not allowed, give uint8 [n, {shape}]")
        shards = mesh_lib.row_shards(self.mesh)
        size = -(-self.config.eval.batch_size // shards) * shards
        found: list[dict[str, np.ndarray]] = []
        for begin in range(0, max(len(images), 1), size):
            batch = images[begin : begin + size]
            filled = np.concatenate([batch, np.zeros((size - len(batch), *self.image_shape), np.uint8)])
            answer = jax.device_get(self._compiled(self._placed, mesh_lib.shard_rows(self.mesh, filled)))
            found.append({name: x[: len(batch)] for name, x in answer.items()})
        return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def load(folder: str | pathlib.Path, devices: Sequence[jax.Device] | None = None) -> Trained:
    """The network that a run has trained, by the weights at its end; of an unfinished run by those of its newest checkpoint,
    which a line on the logger "jaxcl" says. Nothing is needed of the data, and nothing in the folder is changed.

    Args:
      folder: of the run, its workdir.
      devices: on which it answers, any number; default all.

    Raises:
      UserError: there is no such run, what it holds is damaged, or the user's own model or strategy that it names cannot be
        imported here, or has changed so that the weights do not fit.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise refused("workdir", str(folder), "the folder of a run")
    about, flat = _found(folder)
    config = _config(about["config"])
    network = about["network"]
    class_names, image_shape = tuple(network["class_names"]), tuple(network["image_shape"])
    table = np.zeros((len(network["tasks"]), len(class_names)), bool)
    for task, classes in enumerate(network["tasks"]):
        table[task, classes] = True
    read_shape = scaled_shape(image_shape, config.data.get("resize"))
    model = model_of(config, len(class_names), table)
    strategy = fitted_to(strategy_of(config), config, model, read_shape)
    weights = _filled(folder, _shapes(model, strategy, read_shape), flat)
    model = evaluated_model(config, model, read_shape)
    mesh = mesh_lib.make_mesh(devices)
    return Trained(config, class_names, image_shape, about["step"], model, strategy, weights, mesh)


def _found(folder: pathlib.Path) -> tuple[dict[str, Any], weights_lib.Flat]:
    """The weights that there are, and what is known of them."""
    problem = None
    if (folder / workdir.WEIGHTS).is_file():
        try:
            return weights_lib.read(folder / workdir.WEIGHTS)
        except Damaged as error:
            problem = error
    manifest = checkpoint.survey(folder / workdir.CHECKPOINTS).newest
    if manifest is None:
        raise UserError(f"workdir: {problem or f'{folder} holds no weights and no whole checkpoint of a run'}")
    found = weights_lib.of_checkpoint(folder, manifest)
    why = f"{problem}; taken are" if problem else "is not finished; loaded are"
    _log.warning("%s: %s the weights of checkpoint %s, at step %d", folder, why, manifest["name"], found[0]["step"])
    return found


def _config(plain: dict[str, Any]) -> ConfigDict:
    """A config from JSON, which has lists for tuples."""

    def restored(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: restored(value) for name, value in x.items()}
        return tuple(map(restored, x)) if isinstance(x, list) else x

    return ConfigDict(restored(plain))


def _shapes(model: Model, strategy: Strategy, image_shape: tuple[int, int, int]) -> Weights:
    """Of the weights of such a network."""

    def new() -> Weights:
        variables = model.init(jax.random.key(0), image_shape)
        params, batch_stats = variables["params"], variables["batch_stats"]
        return Weights(params, batch_stats, strategy.init(params, batch_stats), jnp.int32(0))

    return jax.eval_shape(new)


def _filled(folder: pathlib.Path, shapes: Weights, flat: weights_lib.Flat) -> Weights:
    """The weights in their places.

    Raises:
      UserError: they are those of another network.
    """
    wanted = checkpoint.flatten(shapes)
    for name in sorted({*wanted, *flat}):
        there = f"{flat[name].dtype}{list(flat[name].shape)}" if name in flat else "nothing"
        here = f"{wanted[name].dtype}{list(wanted[name].shape)}" if name in wanted else "nothing"
        if there != here:
            raise UserError(
                f"workdir: {folder} has {there} for {name}, its network here needs {here}: its code has changed"
            )
    return jax.tree.unflatten(jax.tree.structure(shapes), [flat[name] for name in wanted])
