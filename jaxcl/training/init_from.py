"""`model.init_from`: a run begins with the weights of a file instead of random ones.

The file may be safetensors, npz, a PyTorch file (read without PyTorch, and without running code), the folder of a run, or the
folder of one checkpoint. Every weight and running statistic of the network must be in it, in its shape; only the head, a neck
and prompts may differ or be missing, and are then new. What was loaded, what is new and what of the file is not used is told
once, in a line and in result.json as "init_from".

A run is bound to the numbers, not to the name of a file alone: their digest becomes `model.init_digest` of its config.
"""

import functools
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcl.check import refused
from jaxcl.errors import UserError
from jaxcl.models import Model, is_own
from jaxcl.pretrained import read as files
from jaxcl.pretrained.names import NAMES, here, there
from jaxcl.runs import checkpoint, workdir
from jaxcl.sealed import Damaged, read_sealed
from jaxcl.training import weights as weights_lib
from jaxcl.training.config import check_values

_log = logging.getLogger("jaxcl")


class Loaded(NamedTuple):
    """What a file gives a network.

    Attributes:
      tensors: by their path among the variables, "params.stem.Conv_0.kernel", float32.
      report: for JSON: file, digest, and how many tensors and numbers were loaded; names of those that are new, and of those of
        the file that are not used.
    """

    tensors: dict[str, np.ndarray]
    report: dict[str, Any]


def bound(config: ConfigDict) -> ConfigDict:
    """The config with the digest of its file; the same where it has none.

    Raises:
      UserError: the file cannot be read, its digest is another than the config says, or a field of the config is not allowed.
    """
    check_values(config)
    m = config.model
    if m.init_from is None:
        if m.init_digest is not None:
            raise refused("model.init_digest", m.init_digest, "None without model.init_from")
        return config
    digest = files.digest(found_in(m.init_from))
    if m.init_digest not in (None, digest):
        raise UserError(f"model.init_digest: {m.init_from} has {digest}, not {m.init_digest}: give the file it is of")
    config = config.copy_and_resolve_references()
    config.model.init_digest = digest
    return config


def load(config: ConfigDict, model: Model, image_shape: tuple[int, int, int]) -> Loaded | None:
    """What the file of the config gives the model; None without a file. `image_shape` is that of the model's images.

    Raises:
      UserError: see `found_in` and `fitted`.
    """
    m = config.model
    if m.init_from is None:
        return None
    found = found_in(m.init_from)
    variables = jax.eval_shape(lambda key: model.init(key, image_shape), jax.random.key(0))
    shapes = {name: x.shape for name, x in checkpoint.flatten(variables).items()}
    loaded = fitted(m.init_from, m.name, shapes, found)
    loaded.report["digest"] = files.digest(found)
    said = {name: ", ".join(loaded.report[name][:4]) or "nothing" for name in ("new", "not_used")}
    _log.info(
        "model.init_from: %s: %d tensors of %d numbers loaded; new: %s; of the file not used: %s%s",
        *(m.init_from, loaded.report["tensors"], loaded.report["numbers"], said["new"], said["not_used"]),
        f" and {more} more" if (more := len(loaded.report["not_used"]) - 4) > 0 else "",
    )
    return loaded


def found_in(text: str) -> files.Flat:
    """The tensors of a file, or of a run's folder, or a checkpoint's: those by which the run is evaluated.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    try:
        path = files.locate(text)
        newest = max((x.stat().st_mtime_ns for x in (path, *path.glob("*"))), default=0)
        return _read(path, newest, path.stat().st_size)
    except OSError as error:
        raise UserError(f"model.init_from: {text} cannot be read: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from None


@functools.lru_cache(maxsize=1)
def _read(path: pathlib.Path, *stamp: int) -> files.Flat:
    if not path.is_dir():
        return files.read(path)
    if (path / checkpoint.MANIFEST).is_file():  # one checkpoint
        manifest = {"name": path.name, **read_sealed(path / checkpoint.MANIFEST)}
        flat = weights_lib.of_checkpoint(path.parent.parent, manifest)[1]
    elif (path / workdir.WEIGHTS).is_file():
        try:
            flat = weights_lib.read(path / workdir.WEIGHTS)[1]
        except Damaged as error:
            raise UserError(str(error)) from None
    else:
        newest = checkpoint.survey(path / workdir.CHECKPOINTS).newest
        if newest is None:
            raise UserError(f"{path} holds no run")
        flat = weights_lib.of_checkpoint(path, newest)[1]
    return {name: x for name, x in flat.items() if name.startswith(files.OWN)}


def fitted(file: str, name: str, shapes: dict[str, tuple[int, ...]], found: files.Flat) -> Loaded:
    """The tensors of the file in the places of a network.

    Args:
      file: for messages.
      name: of the model.
      shapes: of its variables, by path.
      found: what the file holds.

    Raises:
      UserError: a tensor of the backbone is missing, of another shape, or not finite.
    """
    own = files.is_own(found)
    if not own and name not in NAMES:
        known = f"those of PyTorch are known for {', '.join(NAMES)}"
        raise UserError(f"model.init_from: {file} has not the names of {name} (params. ...), and {known}")
    tensors, misfits = {}, {}
    for path, shape in shapes.items():
        called = path if own else there(NAMES[name], path)
        tensor = found.get(called)
        if tensor is not None and not own:
            tensor = here(path, tensor, shape)
        if tensor is None or tensor.shape != shape:
            has = "nothing" if tensor is None else f"the shape {tensor.shape}"
            misfits[path] = f"{file} has {has} for {called}, where {name} needs {shape} for {path}"
            continue
        if not np.isfinite(np.asarray(tensor, np.float32)).all():
            raise UserError(f"model.init_from: {file} has numbers in {called} that are not finite")
        tensors[path] = np.asarray(tensor, np.float32)
    for path, why in misfits.items():
        if not is_own(part_of(path)):
            raise UserError(f"model.init_from: {why}; are model.name and model.options those of the file?")
    other = {part_of(path) for path in misfits}  # these parts are loaded whole or not at all
    tensors = {path: x for path, x in tensors.items() if part_of(path) not in other}
    if not tensors:
        raise UserError(f"model.init_from: {file} has nothing for {name} but its head")
    new = [path for path in shapes if path not in tensors]
    loaded = {path if own else there(NAMES[name], path) for path in tensors}
    report = {"file": file, "tensors": len(tensors), "numbers": sum(x.size for x in tensors.values()), "new": new}
    return Loaded(tensors, report | {"not_used": sorted(found.keys() - loaded)})


def part_of(path: str) -> str:
    """The part of the network to which a variable belongs."""
    return path.split(".")[1]
