"""Avalanche's `ReservoirSamplingBuffer` (PyTorch) from a checkout: the storage under its replay plugins.

A step is `update_from_dataset` with the batch as an Avalanche data set, then one batch of a `DataLoader` over the
buffer. Rows are drawn with replacement, which costs Avalanche less than the shuffle of its own loader would.

Importing `avalanche` imports all of it: torchvision, models, loggers. So its packages are entered without their
`__init__`, and a stand-in replaces torchvision's `Compose` where that is not installed; the storage policy and the
data sets it is made of are Avalanche's own code.
"""

import importlib
import pathlib
from typing import Any

from experiments.bench.peers import protocol, torch_peer


def _load(source: pathlib.Path) -> tuple[Any, Any]:
    """Avalanche's storage policies, and the function that makes a data set of tensors."""
    torch_peer.stand_in("torchvision")
    torch_peer.stand_in("torchvision.transforms", Compose=type("Compose", (), {}))
    torch_peer.bare_package("avalanche", source)
    torch_peer.bare_package("avalanche.training", source / "training")
    torch_peer.bare_package("avalanche.models", source / "models", FeatureExtractorBackbone=None)
    torch_peer.bare_package("avalanche.benchmarks", source / "benchmarks")
    utils = torch_peer.bare_package("avalanche.benchmarks.utils", source / "benchmarks" / "utils")
    datasets = importlib.import_module("avalanche.benchmarks.utils.classification_dataset")
    data = importlib.import_module("avalanche.benchmarks.utils.data")
    # What the skipped __init__ would have gathered, as far as the storage policy asks for it.
    vars(utils).update(
        AvalancheDataset=data.AvalancheDataset,
        _taskaware_classification_subset=datasets._taskaware_classification_subset,
    )
    policies = importlib.import_module("avalanche.training.storage_policy")
    return policies, datasets._make_taskaware_tensor_classification_dataset


class Avalanche(torch_peer.TorchPeer):
    name = "avalanche"
    note = "one host; reservoir; a batch stays in memory while one of its rows is stored; draws with replacement"
    peak = 2.5

    def __init__(self, sizes: protocol.Sizes) -> None:
        super().__init__(sizes)
        checkout = torch_peer.enter(sizes.path, "avalanche/training/storage_policy.py")
        import torch

        policies, self._make_dataset = _load(checkout / "avalanche")
        self.version = torch_peer.version(checkout)
        torch.manual_seed(0)
        self._buffer = policies.ReservoirSamplingBuffer(sizes.capacity)

    def fill(self) -> None:
        for rows in protocol.fill_chunks(self.sizes.capacity, chunk=self.sizes.capacity):
            self.insert(self.place(rows))

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


if __name__ == "__main__":
    protocol.main(Avalanche)
