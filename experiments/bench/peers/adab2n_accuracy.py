"""Trains a small convolutional net with the authors' AdaB2N layers, or with PyTorch's batch norms, by plain experience replay.

Runs in an environment with PyTorch; `experiments.studies.adab2n` starts it. It reads JSON on standard input: `path` of their
checkout, `pack` (an npz file), `norm` (BN or AdaB2N), `kappa`, `lambda`, `seeds`, `width`, `fold`, `batch`, `replayed`,
`capacity`, `epochs`, `tasks`, `learning_rate`, `momentum`, `mean`, `std`. It prints a line of JSON for each seed.

The layer is theirs; net, its first weights, loop and reservoir are those of jaxcl's study, and rows are told to the layer as
their ER does.
"""

import json
import sys
import time
from typing import Any

import numpy as np

from experiments.bench.peers.adab2n_layer import make_layer, set_rows


def main() -> None:
    import torch

    asked = json.load(sys.stdin)
    torch.set_num_threads(1)
    with np.load(asked["pack"]) as arrays:
        data = {name: arrays[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    for seed in asked["seeds"]:
        begin = time.perf_counter()
        accuracy = train(asked, data, seed)
        print(json.dumps({"seed": seed, "accuracy": accuracy, "seconds": time.perf_counter() - begin}), flush=True)


def make_net(asked: dict[str, Any], classes: int) -> Any:
    from torch import nn

    side, width = asked["fold"], asked["width"]
    layers: list[nn.Module] = [nn.PixelUnshuffle(side)] if side > 1 else []
    before = 3 * side * side
    for channels in (width, 2 * width, 4 * width):
        conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
        nn.init.normal_(conv.weight, std=(2 / (9 * before)) ** 0.5)
        if asked["norm"] == "BN":
            norm: nn.Module = nn.BatchNorm2d(channels)
        else:
            norm = make_layer(asked["path"], asked["tasks"], asked["kappa"], channels, 0.1)
        layers += [conv, norm, nn.ReLU(), nn.MaxPool2d(2)]
        before = channels
    head, deviation = nn.Linear(before, classes), before**-0.5 / 0.8796  # that of the normal, before it is truncated
    nn.init.trunc_normal_(head.weight, std=deviation, a=-2 * deviation, b=2 * deviation)  # PyTorch's own is smaller
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def train(asked: dict[str, Any], data: dict[str, np.ndarray], seed: int) -> float:
    """The mean accuracy over the tasks after the last, in per cent."""
    import torch

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    classes = int(data["y_train"].max()) + 1
    each = classes // asked["tasks"]
    net = make_net(asked, classes)
    ada = [m for m in net if type(m).__name__ == "AdaB2N"]
    optimizer = torch.optim.SGD(net.parameters(), asked["learning_rate"], asked["momentum"])
    mean, std = (torch.tensor(asked[name])[:, None, None] for name in ("mean", "std"))

    def images(rows: np.ndarray, split: str = "train") -> Any:
        x = torch.from_numpy(np.ascontiguousarray(data[f"x_{split}"][rows])).float().permute(0, 3, 1, 2) / 255
        return (x - mean) / std

    memory, seen = np.zeros(0, np.int64), 0
    for task in range(asked["tasks"]):
        own = np.flatnonzero(data["y_train"] // each == task)
        for _ in range(asked["epochs"]):
            order = rng.permutation(own)
            for begin in range(0, len(order), asked["batch"]):
                new = order[begin : begin + asked["batch"]]
                old = rng.choice(memory, min(asked["replayed"], len(memory)), replace=False)
                rows = np.concatenate([new, old])
                label = torch.from_numpy(data["y_train"][rows].astype(np.int64))
                for layer in ada:
                    set_rows(layer, label // each, task)
                loss = torch.nn.functional.cross_entropy(net(images(rows)), label)
                if ada and task:
                    loss = loss + asked["lambda"] * torch.stack([layer.loss for layer in ada]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                for row in new:  # a reservoir
                    place = seen if seen < asked["capacity"] else int(rng.integers(0, seen + 1))
                    seen += 1
                    if place == len(memory) < asked["capacity"]:
                        memory = np.append(memory, row)
                    elif place < asked["capacity"]:
                        memory[place] = row
    net.eval()
    with torch.no_grad():
        label = data["y_test"]
        right = net(images(np.arange(len(label)), "test")).argmax(1).numpy() == label
    return 100 * float(np.mean([right[label // each == task].mean() for task in range(asked["tasks"])]))


if __name__ == "__main__":
    main()
