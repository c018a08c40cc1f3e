"""The final weights of a run as a file of their own, weights.safetensors, with all that rebuilds its network without its data.

They are those by which the run was evaluated. The tensors are those of `Weights` by their paths, "params.head.kernel" and so
on, as in a checkpoint. The metadata has one entry, "jaxcl": a sealed JSON object of the config, the version and the code, what
`describe` says, and a checksum of every tensor. Any reader of safetensors can read the file.
"""

import json
import pathlib
import zlib
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as as_bytes

import jaxcl
from jaxcl.errors import UserError
from jaxcl.runs import checkpoint, files, workdir
from jaxcl.runs.code import code_of
from jaxcl.sealed import Damaged, check_seal, sealed
from jaxcl.training.state import Weights

if TYPE_CHECKING:  # it reads files of weights itself
    from jaxcl.training.build import Parts

Flat = dict[str, np.ndarray]
GROUPS = tuple(
    f"{name}." for name in Weights._fields if name != "task"
)  # of a checkpoint's arrays, those that are weights

AVERAGE = "average."  # those of a checkpoint that evaluation uses in their place, where an average is kept


def describe(parts: "Parts") -> dict[str, Any]:
    """What the network was built for, for JSON: in the file of the weights, and in every checkpoint as "network"."""
    return {
        "image_shape": list(parts.image_shape),
        "class_names": list(parts.train.class_names),
        "tasks": [list(task.classes) for task in parts.scenario.tasks],
    }


def write(folder: pathlib.Path, config: ConfigDict, parts: "Parts", weights: Weights, step: int) -> None:
    """Writes the file whole or not at all; in a run of several processes, which all call this, by the first."""
    flat = {name: np.asarray(_on_host(x), order="C") for name, x in checkpoint.flatten(weights).items()}
    if jax.process_index() > 0:
        return
    about = {"jaxcl": jaxcl.__version__, "code": code_of(config), "config": workdir.resolved(config), "step": step}
    about |= {"network": describe(parts), "tensors": {name: _checksum(x) for name, x in flat.items()}}
    files.write_whole(folder / workdir.WEIGHTS, as_bytes(flat, {"jaxcl": json.dumps(sealed(about))}))


def read(path: pathlib.Path) -> tuple[dict[str, Any], Flat]:
    """What was written: the metadata, and the tensors by their names.

    Raises:
      Damaged: the file is not as it was written.
    """
    try:
        with safe_open(path, "np") as file:
            about = check_seal(json.loads((file.metadata() or {}).get("jaxcl", "null")), path)
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise Damaged(f"{path} is damaged: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise Damaged(f"{path} is damaged: {' '.join(str(error).split())}") from error
    for name in about["tensors"].keys() | flat.keys():
        if name not in flat or about["tensors"].get(name) != _checksum(flat[name]):
            raise Damaged(f"{path} is damaged: {name} has other contents")
    return about, flat


def of_checkpoint(folder: pathlib.Path, manifest: dict[str, Any]) -> tuple[dict[str, Any], Flat]:
    """The same of a checkpoint, in the folder of a run.

    Raises:
      UserError: it is one of another kind of run, or of a version that did not describe its network.
    """
    if "network" not in manifest:
        raise UserError(
            f"workdir: {folder} holds no run over tasks of jaxcl {jaxcl.__version__}; there is no network to load"
        )
    names = [name for name in manifest["arrays"] if name.startswith((*GROUPS, AVERAGE)) or name == "task"]
    flat = checkpoint.read_arrays(folder / workdir.CHECKPOINTS, manifest, names)
    averages = {name.removeprefix(AVERAGE): flat.pop(name) for name in names if name.startswith(AVERAGE)}
    flat |= averages  # as `TrainState.evaluated`
    about = {"jaxcl": manifest["version"], "code": manifest["code"], "config": manifest["config"]}
    return about | {"step": manifest["run"]["step"], "network": manifest["network"]}, flat


def _on_host(x: jax.Array) -> np.ndarray:
    """A whole array, of which processes may hold parts; all must call it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _checksum(x: np.ndarray) -> int:
    return zlib.crc32(x.tobytes())
