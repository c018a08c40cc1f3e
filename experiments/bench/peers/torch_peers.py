"""Buffers in PyTorch, from checkouts: Mammoth's and Avalanche's.

One module of a project is imported, without all it depends on; where torchvision is not installed, empty modules stand in for
what is not used here. The buffers' code, and that of the data sets they are made of, is the projects' own.
"""

import importlib
import pathlib
import subprocess
import sys
import types
from typing import Any, ClassVar

import numpy as np

from experiments.bench.peers import protocol
from experiments.bench.peers.protocol import Images, Missing, Peer, Sizes


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
    """A module with nothing but `contents`, which is imported under this name from now on. With `__path__ = [folder]` it is a
    package whose modules load from there, while its own `__init__`, which imports everything, never runs."""
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    return module


class TorchPeer(Peer):
    """A peer that takes tensors in host memory."""

    def place(self, rows: Images) -> Any:
        import torch

        return torch.from_numpy(rows[0]), torch.from_numpy(rows[1])


class Mammoth(TorchPeer):
    """Mammoth's `utils.buffer.Buffer`: reservoir sampling, one Python loop turn a row.

    What a step costs depends on how many of its rows the reservoir accepts, `capacity / rows seen`. So it is measured at two
    moments, to which `num_seen_examples` is set back before each step: just full, when nearly every row is stored as in the
    other buffers ("mammoth"), and after a hundred times its capacity, when nearly none is ("mammoth_late").
    """

    name = "mammoth"
    note = "one host, float32 and int64; reservoir just full: stores nearly every row; draws without replacement"
    peak = 5.0
    seen: ClassVar[int] = 1  # rows seen, in capacities

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        checkout = enter(sizes.path, "utils/buffer.py")
        importlib.import_module("PIL.Image")  # Mammoth relies on torchvision having done so
        transforms = stand_in("torchvision.transforms")
        stand_in("torchvision", transforms=transforms)
        stand_in("torchvision.transforms.functional")
        stand_in("utils.kornia_utils", KorniaAugNoGrad=type("KorniaAugNoGrad", (), {}))
        self.version = version(checkout)
        np.random.seed(0)  # the generator Mammoth uses
        self._buffer = importlib.import_module("utils.buffer").Buffer(sizes.capacity)

    def insert(self, rows: tuple) -> None:
        images, labels = rows
        self._buffer.add_data(images, labels=labels)

    def step(self, batch: tuple) -> None:
        self._buffer.num_seen_examples = self.seen * self.sizes.capacity
        self.insert(batch)
        self._buffer.get_data(self.sizes.batch)

    def bytes(self) -> int:
        return sum(x.nbytes for x in (self._buffer.examples, self._buffer.labels))


class MammothLate(Mammoth):
    name = "mammoth_late"
    note = "as mammoth, after 100 times its capacity: stores nearly none of the rows"
    seen = 100


class Avalanche(TorchPeer):
    """Avalanche's `ReservoirSamplingBuffer`: the storage under its replay plugins.

    A step is `update_from_dataset` with the batch as an Avalanche data set, then one batch of a `DataLoader` over the buffer.
    Rows are drawn with replacement, which costs Avalanche less than the shuffle of its own loader would.
    """

    name = "avalanche"
    note = "one host; reservoir; a batch stays in memory while one of its rows is stored; draws with replacement"
    peak = 2.5

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        checkout = enter(sizes.path, "avalanche/training/storage_policy.py")
        import torch

        policies, self._make_dataset = _load_avalanche(checkout / "avalanche")
        self.version = version(checkout)
        torch.manual_seed(0)
        self._buffer = policies.ReservoirSamplingBuffer(sizes.capacity)
        self.chunk = sizes.capacity

    def insert(self, rows: tuple) -> None:
        self._buffer.update_from_dataset(self._make_dataset(*rows, task_labels=0))

    def step(self, batch: tuple) -> None:
        from torch.utils.data import DataLoader, RandomSampler

        self.insert(batch)
        stored = self._buffer.buffer
        sampler = RandomSampler(stored, replacement=True, num_samples=self.sizes.batch)
        next(iter(DataLoader(stored, batch_size=self.sizes.batch, sampler=sampler)))

    def bytes(self) -> int:
        """Bytes of every tensor that the stored data set still refers to."""
        found: dict[int, int] = {}
        todo = [self._buffer.buffer]
        while todo:
            node = todo.pop()
            found |= {tensor.data_ptr(): tensor.nbytes for tensor in getattr(node, "tensors", ())}
            todo += getattr(node, "_datasets", [])
            todo += [node._flat_data] if hasattr(node, "_flat_data") else []
        return sum(found.values())


def _load_avalanche(source: pathlib.Path) -> tuple[Any, Any]:
    """Avalanche's storage policies, and the function that makes a data set of tensors."""
    stand_in("torchvision")
    stand_in("torchvision.transforms", Compose=type("Compose", (), {}))
    empty("avalanche", __path__=[str(source)])
    for name in ("training", "models", "benchmarks", "benchmarks.utils"):
        empty(f"avalanche.{name}", __path__=[str(source / name.replace(".", "/"))])
    vars(sys.modules["avalanche.models"])["FeatureExtractorBackbone"] = None
    datasets = importlib.import_module("avalanche.benchmarks.utils.classification_dataset")
    data = importlib.import_module("avalanche.benchmarks.utils.data")
    # What the skipped __init__ would have gathered, as far as the storage policy asks for it.
    vars(sys.modules["avalanche.benchmarks.utils"]).update(
        AvalancheDataset=data.AvalancheDataset,
        _taskaware_classification_subset=datasets._taskaware_classification_subset,
    )
    policies = importlib.import_module("avalanche.training.storage_policy")
    return policies, datasets._make_taskaware_tensor_classification_dataset


if __name__ == "__main__":
    protocol.main(Mammoth, MammothLate, Avalanche)
