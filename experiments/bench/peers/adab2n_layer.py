"""Prints what the authors' AdaB2N layer makes of given batches. Runs in an environment with PyTorch.

    python -m experiments.bench.peers.adab2n_layer CHECKOUT < REQUEST

CHECKOUT is theirs (github.com/lvyilin/AdaB2N). REQUEST is JSON: `tasks`, `now`, `kappa`, `phi` [T], `momentum` (theirs, the
share of the batch), `batches`: a list of {"x": [n, H, W, C], "task": [n]}. The answer is JSON, of each batch `out`, `mean`,
`var` and `penalty`.
"""

import importlib.util
import json
import pathlib
import sys
from typing import Any


def make_layer(path: str, tasks: int, kappa: float, channels: int, momentum: float) -> Any:
    """Theirs, in the place of a new batch norm. Its file alone is read: their package needs more than it."""
    import torch

    spec = importlib.util.spec_from_file_location("adab2n", pathlib.Path(path) / "models" / "utils" / "adab2n.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.AdaB2N(torch.nn.BatchNorm2d(channels, momentum=momentum), tasks, 1, kappa)


def set_rows(layer: Any, task: Any, now: int) -> None:
    """Tells the layer of the rows of a batch, as their strategies do; `task` is a tensor `[n]`."""
    import torch

    counts = torch.bincount(task, minlength=now + 1)
    layer.cur_tasks.fill_(now)
    layer.set_counts(task, counts[task], counts)


def main() -> None:
    import torch

    asked = json.load(sys.stdin)
    channels = len(asked["batches"][0]["x"][0][0][0])
    layer = make_layer(sys.argv[1], asked["tasks"], asked["kappa"], channels, asked["momentum"])
    with torch.no_grad():
        layer.task_weight.copy_(torch.tensor(asked["phi"]))
    found = []
    for batch in asked["batches"]:
        set_rows(layer, torch.tensor(batch["task"]), asked["now"])
        out = layer(torch.tensor(batch["x"]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        stats = {"mean": layer.running_mean.tolist(), "var": layer.running_var.tolist()}
        found.append({"out": out.tolist(), **stats, "penalty": float(layer.loss)})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
