"""Mammoth's `utils.buffer.Buffer` (PyTorch) from a checkout: reservoir sampling, one Python loop turn a row.

What a step costs depends on how many of its rows the reservoir accepts, `capacity / rows seen`. So it is measured at
two moments, to which `num_seen_examples` is set back before each step: just full, when nearly every row is stored as in
the other buffers ("mammoth"), and after a hundred times its capacity, when nearly none is ("mammoth_late").

`utils.buffer` imports Mammoth's augmentations, hence torchvision and Kornia, for a transform that is not used here.
Where they are not installed, empty modules stand in for them; the buffer's code is Mammoth's own.
"""

import importlib
from typing import ClassVar

import numpy as np

from experiments.bench.peers import protocol, torch_peer


class Mammoth(torch_peer.TorchPeer):
    name = "mammoth"
    note = "one host, float32 and int64; reservoir just full: stores nearly every row; draws without replacement"
    peak = 5.0
    seen: ClassVar[int] = 1  # rows seen, in capacities

    def __init__(self, sizes: protocol.Sizes) -> None:
        super().__init__(sizes)
        checkout = torch_peer.enter(sizes.path, "utils/buffer.py")
        importlib.import_module("PIL.Image")  # Mammoth relies on torchvision having done so
        transforms = torch_peer.stand_in("torchvision.transforms")
        torch_peer.stand_in("torchvision", transforms=transforms)
        torch_peer.stand_in("torchvision.transforms.functional")
        torch_peer.stand_in("utils.kornia_utils", KorniaAugNoGrad=type("KorniaAugNoGrad", (), {}))
        self.version = torch_peer.version(checkout)
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


if __name__ == "__main__":
    protocol.main(Mammoth, MammothLate)
