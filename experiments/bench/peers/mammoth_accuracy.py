"""Mammoth's strategies (PyTorch) from a checkout, trained on a protocol of jaxcl's: the reference of a benchmark.

The strategies (`models/*.py`) and `utils/buffer.py` are Mammoth's own: what a step computes, stores and replays, and what a
task's end does. The rest, which Mammoth spreads over argument parsers, data set classes and loggers that need torchvision,
Kornia and timm, is written out here: the network, plain SGD, shuffled batches without augmentation, tasks of some classes or
of permuted pixels, and the unweighted mean over the tasks' test accuracies after the last one.

`experiments.studies.references --mammoth=CHECKOUT` calls this with a protocol as JSON on stdin, see `main`; every seed's
accuracy comes back as a line of JSON.
"""

import argparse
import importlib
import itertools
import json
import sys
import time
import types
from typing import Any

import numpy as np

from experiments.bench.peers import torch_peers

CLASSES = {
    "er": ("models.er", "Er"),
    "der": ("models.der", "Der"),
    "der_pp": ("models.derpp", "Derpp"),
    "agem": ("models.agem", "AGem"),
    "incremental": ("models.sgd", "Sgd"),
    "joint": ("models.sgd", "Sgd"),  # on the rows of all tasks at once
    "ewc": ("models.ewc_on", "EwcOn"),
}
OPTIONS = {"strength": "e_lambda"}  # what Mammoth calls by another name
Protocol = dict[str, Any]


def import_strategy(name: str, path: str) -> tuple[type, str]:
    """Mammoth's class for a strategy, and the checkout's version. Its base class and argument parser are stand-ins."""
    import torch

    checkout = torch_peers.enter(path, "models/der.py")
    importlib.import_module("PIL.Image")  # Mammoth relies on torchvision having done so

    class ContinualModel(torch.nn.Module):
        def __init__(self, net: Any, loss: Any, args: Any, transform: Any, dataset: Any = None) -> None:
            super().__init__()
            self.net, self.loss, self.args, self.transform = net, loss, args, transform
            self.device = torch.device("cpu")
            self.opt = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.optim_mom)

    torch_peers.empty("torchvision", transforms=None)
    torch_peers.empty("torchvision.transforms", functional=None)
    torch_peers.empty("utils.kornia_utils", KorniaAugNoGrad=type("KorniaAugNoGrad", (), {}))
    torch_peers.empty("utils.args", add_rehearsal_args=None, ArgumentParser=argparse.ArgumentParser)
    torch_peers.empty("models", __path__=[str(checkout / "models")])
    torch_peers.empty("models.utils", __path__=[str(checkout / "models" / "utils")])
    torch_peers.empty("models.utils.continual_model", ContinualModel=ContinualModel)
    file, cls = CLASSES[name]
    return getattr(importlib.import_module(file), cls), torch_peers.version(checkout)


def network(model: dict[str, Any], inputs: int, num_classes: int) -> Any:
    """`jaxcl.models`' mlp with Xavier weights, which is Mammoth's MNIST network, newly initialised."""
    import torch
    from torch import nn

    class Network(nn.Sequential):
        """With what EWC asks of a network: parameters and gradients as one vector."""

        def get_params(self) -> Any:
            return nn.utils.parameters_to_vector(self.parameters())

        def get_grads(self) -> Any:
            return torch.cat([p.grad.reshape(-1) for p in self.parameters()])

        def set_grads(self, grads: Any) -> None:
            parameters = list(self.parameters())
            for p, grad in zip(parameters, grads.split([p.numel() for p in parameters]), strict=True):
                p.grad = grad.view_as(p)

    if (model["name"], model["kernel_init"]) != ("mlp", "xavier"):
        raise SystemExit(f"model: {model} is not known here, only an mlp with kernel_init = xavier")
    sizes = [inputs, *model["hidden"], num_classes]
    layers: list[Any] = [nn.Flatten()]
    for n, units in itertools.pairwise(sizes):
        layer = nn.Linear(n, units)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return Network(*layers[:-1])


def run(protocol: Protocol, strategy: type, seed: int, data: dict[str, Any]) -> float:
    """Final average accuracy in 0..1 of one seed."""
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed)  # the generator of Mammoth's buffer
    args = types.SimpleNamespace(
        lr=protocol["learning_rate"],
        optim_mom=protocol["momentum"],
        buffer_size=protocol["capacity"],
        minibatch_size=protocol["replayed"],
        batch_size=protocol["batch_size"],
        **{OPTIONS.get(name, name): value for name, value in protocol["options"].items() if name != "online"},
    )
    net = network(protocol["model"], data["x_train"][0].numel(), int(data["y_train"].max()) + 1)
    model = strategy(net, torch.nn.functional.cross_entropy, args, None)
    tasks = [task(data, classes, protocol["permuted"]) for classes in protocol["tasks"]]
    phases = [train for train, _ in tasks]
    if protocol["strategy"] == "joint":
        phases = [tuple(torch.cat(x) for x in zip(*phases, strict=True))]

    def batches(images: Any, labels: Any) -> list[tuple[Any, Any]]:
        """Training rows in a new order."""
        order = torch.randperm(len(labels)).split(protocol["batch_size"])
        return [(images[rows], labels[rows]) for rows in order]

    for number, train in enumerate(phases, start=1):
        net.train()
        for epoch in range(protocol["epochs"]):
            for images, labels in batches(*train):
                model.observe(images, labels, images, epoch=epoch)
        if hasattr(model, "end_task") and number < len(phases):  # after the last one nothing would come of it
            rows = [(images, labels, images) for images, labels in batches(*train)]
            model.end_task(types.SimpleNamespace(train_loader=rows, N_TASKS=len(tasks)))
    net.eval()
    with torch.no_grad():
        right = [torch.cat([net(x).argmax(1) for x in images.split(1000)]) == labels for _, (images, labels) in tasks]
    return float(np.mean([x.float().mean().item() for x in right]))


def task(data: dict[str, Any], classes: list[int], permuted: bool) -> list[tuple[Any, Any]]:
    """Images and labels of some classes, to train on and to test on; their pixels permuted at random if asked for."""
    import torch

    order, found = torch.randperm(data["x_train"][0].numel()), []
    for split in ("train", "test"):
        rows = torch.isin(data[f"y_{split}"], torch.tensor(classes))
        images = data[f"x_{split}"][rows]
        if permuted:
            images = images.flatten(1)[:, order].view(images.shape)
        found.append((images, data[f"y_{split}"][rows]))
    return found


def load(file: str, mean: list[float] | None, std: list[float] | None) -> dict[str, Any]:
    """The pack as tensors: images float32 `[n, C, H, W]` in 0..1, normalised if mean and std are given."""
    import torch

    def images(x: np.ndarray) -> Any:
        x = x.astype(np.float32).reshape(*x.shape[:3], -1) / 255
        if mean is not None:
            x = (x - np.array(mean, np.float32)) / np.array(std, np.float32)
        return torch.from_numpy(x).permute(0, 3, 1, 2)

    with np.load(file) as pack:
        labels = {name: torch.from_numpy(pack[name].astype(np.int64)) for name in ("y_train", "y_test")}
        return labels | {name: images(pack[name]) for name in ("x_train", "x_test")}


def main() -> None:
    """Reads the protocol: path, data (an npz file), strategy, options, capacity, replayed, batch_size, epochs, learning_rate,
    momentum, model, mean, std, tasks, permuted, seeds."""
    protocol = json.load(sys.stdin)
    strategy, version = import_strategy(protocol["strategy"], protocol["path"])
    data = load(protocol["data"], protocol["mean"], protocol["std"])
    for seed in protocol["seeds"]:
        begin = time.perf_counter()
        accuracy = run(protocol, strategy, seed, data)
        line = {"seed": seed, "accuracy": accuracy, "seconds": time.perf_counter() - begin, "version": version}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
