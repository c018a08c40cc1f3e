"""What the PyTorch peers share: one module of a project is imported from its checkout, without all it depends on."""

import importlib
import pathlib
import subprocess
import sys
import types
from typing import Any

from experiments.bench.peers.protocol import Images, Missing, Peer


def enter(path: str | None, file: str) -> pathlib.Path:
    """The checkout at `path`, with its modules importable and PyTorch ready.

    Raises:
      Missing: it is not there, or does not contain `file`.
      ImportError: PyTorch is not installed.
    """
    import torch

    if path is None:
        raise Missing("no path to a checkout was given")
    if not (pathlib.Path(path) / file).is_file():
        raise Missing(f"{path} is no checkout: it has no {file}")
    # Steps of a few rows gain nothing from threads, and lose up to tenfold where cores are few or busy.
    torch.set_num_threads(1)
    sys.path.insert(0, path)
    return pathlib.Path(path)


def version(checkout: pathlib.Path) -> str:
    """The checkout's commit, "unknown" where it is a bare copy of the files, and PyTorch's version."""
    import torch

    commit = "unknown commit"
    if (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
        commit = subprocess.check_output(command, text=True).strip()
    return f"{commit}, torch {torch.__version__}"


def stand_in(name: str, **contents: Any) -> types.ModuleType:
    """The module `name`, or, where it cannot be imported, an otherwise empty one with `contents` in its place."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return empty(name, **contents)


def empty(name: str, **contents: Any) -> types.ModuleType:
    """A module with nothing but `contents`, which is imported under this name from now on."""
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    return module


def bare_package(name: str, folder: pathlib.Path, **contents: Any) -> types.ModuleType:
    """A package whose submodules load from `folder` while its own `__init__`, which imports everything, never runs."""
    return empty(name, __path__=[str(folder)], **contents)


class TorchPeer(Peer):
    """A peer that takes tensors in host memory."""

    def place(self, rows: Images) -> Any:
        import torch

        return torch.from_numpy(rows[0]), torch.from_numpy(rows[1])
