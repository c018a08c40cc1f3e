"""AdaB2N's gain over a batch norm: ours, and that of the authors' own layers in PyTorch, by the same protocol.

    python -m experiments.studies.adab2n --config=configs/split_cifar10.py:cpu --config.data.source=npz:FILE --workdir=DIR
        --json=experiments/results/adab2n.json [--checkout=CHECKOUT --peer_python=PEERS_ENV/bin/python] [--seeds=3] [--vmap]

CHECKOUT is theirs, github.com/lvyilin/AdaB2N. Split-CIFAR-10 cut down, 10 new and 10 replayed rows a step, a reservoir, a
convolutional net of width 8, plain cross-entropy, no augmentation. One device, as theirs knows no other.
"""

import json
import subprocess
import sys

from absl import flags

from experiments.pages.page import ROOT, Json
from experiments.studies import grid
from experiments.studies.grid import Setting
from jaxcl import cli, report
from jaxcl.check import refused
from jaxcl.errors import UserError
from jaxcl.search.seeds import train_seeds

CHECKOUT = flags.DEFINE_string("checkout", None, "of the authors' code; without it ours run alone")
PEER_PYTHON = flags.DEFINE_string("peer_python", sys.executable, "interpreter that has PyTorch")
KAPPA, STRENGTH, WIDTH, FOLD = 0.4, 0.1, 8, 2
FIELDS: Json = {
    "strategy": "er",
    "batch_size": 10,  # as the paper's online runs
    "epochs": 1,
    "data.augment": (),
    "buffer.policy": "reservoir",
    "buffer.capacity": 500,
    "buffer.representatives": 10,
    "buffer.candidates": 10,
    "model.name": "convnet",
    "optimizer.learning_rate": 0.03,
    "optimizer.momentum": 0.0,
}
NORMS: dict[str, Json] = {
    "BN": {"norm": "sync"},
    "AdaB2N": {"norm": "ada", "norm_options": {"kappa": KAPPA, "strength": STRENGTH}},
}


def settings() -> list[Setting]:
    shared = {"width": WIDTH, "fold": FOLD}
    return [Setting(name, FIELDS | {"model.options": shared | NORMS[name]}, {"row": name}, 1) for name in NORMS]


def main() -> None:
    more: Json = {"train": train_seeds, "options": {"together": True}} if cli.VMAP.value else {}
    study = grid.from_flags(seeds=3, **more)
    kind, _, pack = study.config.data.source.partition(":")
    if kind != "npz":
        raise refused("config.data.source", study.config.data.source, "npz:FILE")
    found: Json = {"fields": FIELDS, "kappa": KAPPA, "lambda": STRENGTH}
    found["ours"] = study.records(settings(), lambda runs: grid.each(runs, "average_accuracy", "seconds"))
    if CHECKOUT.value:
        config = grid.changed(study.config, FIELDS)
        asked = {
            **{"path": CHECKOUT.value, "pack": pack, "kappa": KAPPA, "lambda": STRENGTH, "width": WIDTH, "fold": FOLD},
            **{"batch": config.batch_size, "replayed": config.buffer.representatives, "epochs": config.epochs},
            **{"capacity": config.buffer.capacity, "tasks": config.data.tasks, "momentum": config.optimizer.momentum},
            **{"learning_rate": config.optimizer.learning_rate, "mean": config.data.mean, "std": config.data.std},
            "seeds": list(range(config.seed, config.seed + study.seeds)),
        }
        found["theirs"] = [theirs(name, asked) for name in NORMS]
    if cli.JSON.value:
        grid.write(cli.JSON.value, found)


def theirs(name: str, asked: Json) -> Json:
    """A record of all seeds with PyTorch's batch norm, or with the authors' layers."""
    command = [PEER_PYTHON.value, "-m", "experiments.bench.peers.adab2n_accuracy"]
    request = json.dumps({**asked, "norm": name})
    done = subprocess.run(command, cwd=ROOT, input=request, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-300:]}")
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    accuracy = [run["accuracy"] / 100 for run in runs]
    print(f"theirs, {name}: {report.spread(accuracy)} %", flush=True)
    return {"row": name, "average_accuracy": accuracy, "seconds": [run["seconds"] for run in runs]}


if __name__ == "__main__":
    cli.run(main)
