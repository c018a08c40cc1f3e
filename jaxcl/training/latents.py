"""Runs on activations: the rows of a run are what a layer of a network that stays gives for its images.

Pellegrini et al. 2020, Latent replay for real-time continual learning. With `latent.layer` everything up to that layer keeps
the weights of `model.init_from`. Its activations are computed once, for all rows, when the run begins, and stand for the images
from then on: they are handed over, stored in the buffer, drawn and exchanged as the bytes that they are (`jaxcl.latent`), and
every strategy, policy and tier works on them as on images. The network that is trained is what lies above the layer.

With `latent.below = slow` all of it is trained, what lies below from new rows alone, at rates of its own. Rows are images, and
the memory holds the activations of a row as the step that trained on it made them. They age as the network goes on.

Augmentation belongs below the layer, so a row has `latent.views` augmented views beside the plain one, of which each time one
is drawn; evaluation, and passes at a task's end, see the plain one. A folder `latent.cache` keeps the bytes for other runs: a
file for each set of rows, named by a digest of all that they depend on.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxcl import data, latent
from jaxcl import mesh as mesh_lib
from jaxcl.check import refused
from jaxcl.data.augment import Augment, Normalize
from jaxcl.errors import StorageError, UserError
from jaxcl.mesh import ROWS, WHOLE, on_mesh
from jaxcl.models import Halves, Model
from jaxcl.strategies import Strategy
from jaxcl.strategies.base import Outputs
from jaxcl.types import PyTree

_log = logging.getLogger("jaxcl")


@dataclasses.dataclass(frozen=True)
class Codec:
    """Between activations and rows.

    Attributes:
      shape: of one row's activations.
      dtype: in which they are stored.
      views: augmented ones beside the plain one.
    """

    shape: tuple[int, ...]
    dtype: str
    views: int = 0

    @property
    def row_shape(self) -> tuple[int, int, int]:
        return 1 + self.views, 1, latent.row_bytes(self.shape, self.dtype)

    def stored(self, activations: jax.Array) -> jax.Array:
        """Activations `[n, *shape]` -> uint8 `[n, 1, 1, bytes]`."""
        return latent.encode(activations, self.dtype)[:, None, None]

    def plain(self, rows: jax.Array) -> jax.Array:
        """uint8 `[n, views, 1, bytes]` -> float32 `[n, *shape]` of the plain view."""
        return latent.decode(rows[:, 0, 0], self.shape, self.dtype)

    def drawn(self, key: jax.Array, numbers: jax.Array, rows: jax.Array) -> jax.Array:
        """The same of an augmented view, which the key and the row's number in the global batch choose."""
        if not self.views:
            return self.plain(rows)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        view = jax.vmap(lambda one: jax.random.randint(one, (), 1, 1 + self.views))(keys)
        return latent.decode(rows[jnp.arange(len(rows)), view, 0], self.shape, self.dtype)

    def rounded(self, activations: jax.Array) -> jax.Array:
        """What is left of activations that were stored."""
        return latent.decode(latent.encode(activations, self.dtype), self.shape, self.dtype)


def check_latent(config: ConfigDict, strategy: Strategy) -> None:
    """Whether the fields go together, and with the strategy.

    Raises:
      UserError: they do not.
    """
    one, augment = config.latent, tuple(config.data.augment)
    if one.layer is None:
        for name in ("views", "cache"):
            if one[name]:
                raise refused(f"latent.{name}", one[name], "none of it without latent.layer")
        if one.below != "frozen":
            raise refused("latent.below", one.below, "frozen without latent.layer")
        return
    if one.below == "slow":
        check_slow(config, strategy)
        return
    if config.model.init_from is None:
        raise UserError("model.init_from: None is not allowed with latent.layer, give weights for what lies below it")
    if bool(augment) != bool(one.views):
        allowed = "1 or more: data.augment makes views below the layer" if augment else "0 without data.augment"
        raise refused("latent.views", one.views, allowed)
    if config.data.workers:
        raise refused("data.workers", config.data.workers, "0 with latent.layer, whose rows are in memory")


def check_slow(config: ConfigDict, strategy: Strategy) -> None:
    """The same where what lies below the layer learns.

    Raises:
      UserError: they do not go together.
    """
    one = config.latent
    if not strategy.draws or strategy.rehearse:
        raise refused("latent.below", "slow", f"frozen with {config.strategy}, which replays no rows beside new ones")
    if strategy.fit is not None:
        raise refused("latent.below", "slow", f"frozen with {config.strategy}, which has to know the layers that learn")
    for name in ("views", "cache"):
        if one[name]:
            raise refused(f"latent.{name}", one[name], "none of it with latent.below = slow, where new rows are images")
    if config.buffer.replay != "draw":
        raise refused("buffer.replay", config.buffer.replay, "draw with latent.below = slow")
    if config.finetune.epochs:
        raise refused("finetune.epochs", config.finetune.epochs, "0 with latent.below = slow")
    if config.microbatches > 1:
        raise refused("microbatches", config.microbatches, "1 with latent.below = slow")


def remembering(strategy: Strategy, codec: Codec) -> Strategy:
    """The strategy, whose memory holds activations where it would hold images."""

    def record(image: jax.Array, outputs: Outputs) -> PyTree:
        del image
        return strategy.record(codec.stored(outputs[latent.LATENT]), outputs)

    return strategy._replace(record=record, stores_outputs=True)


def whole_model(model: Model, halves: Halves, codec: Codec) -> Model:
    """The network from images, its activations rounded as they are where they are stored; for evaluation."""

    def apply(
        params: PyTree, batch_stats: PyTree, images: jax.Array, **how: Any
    ) -> tuple[dict[str, jax.Array], PyTree]:
        activations = codec.rounded(halves.lower(params, batch_stats, images))
        return halves.upper.apply(params, batch_stats, activations, **how)

    return model._replace(apply=apply)


class Activations:
    """The rows of a source as activations, computed when the first of them is read.

    Attributes:
      source: with the same labels, whose images are the bytes.
      error: the root of the mean squared error of storing them, relative to theirs; None before.
    """

    def __init__(self, of: data.Source, compute: Callable[[data.Source], tuple[np.ndarray, float]], codec: Codec):
        self._of, self._compute, self._lock = of, compute, threading.Lock()
        self._rows: np.ndarray | None = None
        self.error: float | None = None
        self.source = data.Source(of.labels, codec.row_shape, of.class_names, self.read, in_memory=True)

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.prepare()
        assert self._rows is not None
        return self._rows[indices]

    def prepare(self) -> None:
        """Computes the rows, or reads them from the cache."""
        with self._lock:
            if self._rows is None:
                self._rows, self.error = self._compute(self._of)


@dataclasses.dataclass(frozen=True)
class Below:
    """What gives the activations.

    Attributes:
      lower: see `jaxcl.models.Halves`.
      weights: params and batch_stats of which it uses those below the layer, NumPy arrays.
      augment, normalize: of images.
      codec: see there.
      digest: of all that the bytes depend on beside the rows.
      cache: a folder; None: they are not kept.
      batch_size: images at once.
      devices: of this process.
    """

    lower: Callable[[PyTree, PyTree, jax.Array], jax.Array]
    weights: tuple[PyTree, PyTree]
    augment: Augment
    normalize: Normalize
    codec: Codec
    digest: str
    cache: str | None
    batch_size: int
    devices: tuple[jax.Device, ...]

    def of(self, source: data.Source) -> tuple[np.ndarray, float]:
        """The rows of all images of a source, uint8 `[n, views, 1, bytes]`, and the relative error of storing them.

        Raises:
          StorageError: the cache cannot be written.
        """
        if self.cache is None:
            return self.computed(source)
        name = hashlib.sha256((self.digest + data.given_name(source, source)).encode()).hexdigest()[:24]
        path = pathlib.Path(self.cache).expanduser() / f"latents_{name}.npz"
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                rows, error = file["rows"], float(file["error"])
            if rows.shape == (len(source), *self.codec.row_shape) and rows.dtype == np.uint8:
                return rows, error
        except FileNotFoundError:
            pass
        except Exception:  # damaged: NumPy raises what the first wrong byte leads to
            _log.warning("latent.cache: %s is damaged and is made anew", path)
        rows, error = self.computed(source)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(f".{os.getpid()}.tmp").open("wb") as file:
                np.savez(file, rows=rows, error=error)
            path.with_suffix(f".{os.getpid()}.tmp").replace(path)
        except OSError as problem:
            raise StorageError(f"latent.cache: {path} cannot be written: {problem.strerror}") from problem
        return rows, error

    def computed(self, source: data.Source) -> tuple[np.ndarray, float]:
        mesh = mesh_lib.make_mesh(self.devices)
        size = -(-self.batch_size // mesh.size) * mesh.size
        program = on_mesh(mesh, functools.partial(_activations, self), (WHOLE, ROWS, ROWS), (ROWS, ROWS))
        weights = mesh_lib.replicate(mesh, self.weights)
        rows, squares = [], np.zeros(2)
        for begin in range(0, len(source), size):
            numbers = np.arange(begin, min(begin + size, len(source)))
            padded = np.resize(numbers, size)
            batch = mesh_lib.shard_rows(mesh, (padded.astype(np.int32), source.read(padded)))
            encoded, sums = jax.device_get(program(weights, *batch))
            rows.append(encoded[: len(numbers)])
            squares += sums[: len(numbers)].sum(0, dtype=np.float64)
        return np.concatenate(rows), float(np.sqrt(squares[0] / max(squares[1], 1e-30)))


def _activations(below: Below, weights: PyTree, numbers: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of images on this device, and of each row the sums of squares of error and activation, `[n, 2]`."""
    (params, batch_stats), codec, views, sums = weights, below.codec, [], jnp.zeros((len(images), 2))
    key = jax.random.key(0)  # the same for every run, so that runs of several seeds share what is computed
    for view in range(1 + codec.views):
        seen = below.augment(jax.random.fold_in(key, view), numbers, images) if view else below.normalize(images)
        x = below.lower(params, batch_stats, seen).astype(jnp.float32)
        error = jnp.square(codec.rounded(x) - x), jnp.square(x)
        sums += jnp.stack([one.reshape(len(x), -1).sum(1) for one in error], axis=1)
        views.append(latent.encode(x, codec.dtype)[:, None, None])
    return jnp.concatenate(views, axis=1), sums


def digest_of(config: ConfigDict, tensors: dict[str, np.ndarray], below: tuple[str, ...]) -> str:
    """Of all that activations depend on but for the images: the weights below the layer, and the fields that say how images are
    read."""
    m, d = config.model, config.data
    fields = [
        m.name,
        m.dtype,
        m.options.to_dict(),
        d.mean,
        d.std,
        d.resize,
        d.augment,
        config.latent.to_dict() | {"cache": ""},
    ]
    whole = hashlib.sha256(json.dumps(fields, default=list).encode())
    for name, x in sorted(tensors.items()):
        if name.split(".")[1] in below:
            whole.update(name.encode() + np.ascontiguousarray(x).tobytes())
    return whole.hexdigest()
