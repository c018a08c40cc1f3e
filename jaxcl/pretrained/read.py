"""Files of weights, whatever wrote them: safetensors, NumPy's npz, PyTorch's own format.

Names are flat, with dots. A file of this library has those of a checkpoint, "params.stem.Conv_0.kernel" and "batch_stats. ...";
any other is taken for one of PyTorch, see `jaxcl.pretrained.names`.
"""

import hashlib
import importlib.util
import pathlib

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxcl.errors import UserError
from jaxcl.pretrained import torch_file

Flat = dict[str, np.ndarray]
OWN = ("params.", "batch_stats.")
PACKAGE = "package:"  # "package:NAME" is the file of weights within an installed package
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")
_AROUND = ("state_dict.", "model_state_dict.", "model.", "module.")  # what training programs put before every name


def locate(text: str) -> pathlib.Path:
    """The file or folder that `text` names.

    Raises:
      UserError: there is none, or a package has not just one file of weights; nothing of the package is imported.
    """
    if not text.startswith(PACKAGE):
        path = pathlib.Path(text).expanduser()
        if not path.exists():
            raise UserError(f"{text} is not there")
        return path
    name = text.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {name!r} is not installed")
    found = [
        file
        for folder in spec.submodule_search_locations
        for file in sorted(pathlib.Path(folder).rglob("*"))
        if file.suffix in SUFFIXES
    ]
    if len(found) != 1:
        raise UserError(f"the package {name!r} has {len(found)} files of weights, not one")
    return found[0]


def read(path: pathlib.Path) -> Flat:
    """The tensors of a file by their names.

    Raises:
      UserError: it cannot be read, or holds something else; without the name of the field.
    """
    readers = {".safetensors": _safetensors, ".npz": _npz}
    found = readers.get(path.suffix, torch_file.tensors)(path)
    found = {name.replace("/", "."): x for name, x in found.items()}
    for prefix in _AROUND:
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): x for name, x in found.items()}
    if not found:
        raise UserError(f"{path} holds no tensors")
    return found


def is_own(found: Flat) -> bool:
    """Whether the names are those of this library."""
    return any(name.startswith(OWN) for name in found)


def digest(found: Flat) -> str:
    """Of names, types, shapes and numbers: the same for the same weights in another kind of file."""
    whole = hashlib.sha256()
    for name, x in sorted(found.items()):
        whole.update(f"{name} {x.dtype} {x.shape} ".encode() + np.ascontiguousarray(x).tobytes())
    return whole.hexdigest()[:16]


def _safetensors(path: pathlib.Path) -> Flat:
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def _npz(path: pathlib.Path) -> Flat:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile and NumPy raise what a damaged byte leads to
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
