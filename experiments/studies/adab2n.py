"""AdaB2N's gain over a batch norm: ours, and that of the authors' own layers in PyTorch, by the same protocol.

    python -m experiments.studies.adab2n --config=configs/split_cifar10.py:cpu --config.data.source=npz:FILE --workdir=DIR
        --json=experiments/results/adab2n.json [--checkout=CHECKOUT --peer_python=PEERS_ENV/bin/python] [--seeds=3] [--vmap]

CHECKOUT is theirs, github.com/lvyilin/AdaB2N. Split-CIFAR-10 cut down, 10 new and 10 replayed rows a step, a reservoir, a
convolutional net of width 8, plain cross-entropy, no augmentation. One device, as theirs knows no other.
"""

import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.pages.page import ROOT, Json
from experiments.studies import grid
from experiments.studies.grid import PEER_PYTHON, Setting
from jaxcl import cli, report
from jaxcl.check import refused
from jaxcl.errors import UserError
from jaxcl.models import PENALTIES, RowFacts, make_norm
from jaxcl.search.seeds import train_seeds

CHECKOUT = flags.DEFINE_string("checkout", None, "of the authors' code; without it ours run alone")
KAPPA, STRENGTH, WIDTH, FOLD = 0.4, 0.1, 8, 2
FIELDS: Json = {
    "strategy": "er",
    "batch_size": 10,  # as the paper's online runs
    "loss.prior": "none",
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
        found["layers_apart"] = [layers_apart(kappa) for kappa in (0.0, KAPPA, 1.0)]
        print(f"largest differences of the layers: {found['layers_apart']}", flush=True)
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


def layers_apart(kappa: float) -> float:
    """The largest difference between our layer and theirs over three batches, one of them without a task: of outputs, running
    statistics and regulariser, from the same weights."""
    rng, now, n, channels = np.random.default_rng(0), 2, 10, 5
    phi = rng.normal(0, 0.5, now + 2).astype(np.float32)
    tasks = [rng.choice(which, n).astype(np.int32) for which in ((0, 1, 2), (0, 2), (0, 1, 2))]
    batches = [{"x": rng.normal(1, 2, (n, 3, 3, channels)).astype(np.float32), "task": task} for task in tasks]
    request = {"tasks": now + 2, "now": now, "kappa": kappa, "phi": phi, "momentum": 0.1, "batches": batches}
    [line] = peer("adab2n_layer", json.dumps(request, default=np.ndarray.tolist), str(CHECKOUT.value))
    options = {"kappa": kappa, "strength": 1.0, "first_task": 0}
    layer = make_norm("ada", options, axis_name=None, dtype=jnp.dtype("float32"), tasks=now + 2).layer()
    start = layer.init(jax.random.key(0), batches[0]["x"], train=False)
    params, statistics, worst = start["params"] | {"phi": phi}, start["batch_stats"], 0.0
    place, mutable = np.arange(n, dtype=np.int32), ["batch_stats", PENALTIES]
    for batch, its in zip(batches, json.loads(line), strict=True):
        ours = RowFacts(np.ones(n, bool), batch["task"], place < 0, place, place * 0 + n, np.int32(now), n)  # type: ignore[arg-type]
        variables = {"params": params, "batch_stats": statistics}
        out, updates = layer.apply(variables, batch["x"], train=True, mask=ours, mutable=mutable)
        statistics, penalty = updates["batch_stats"], sum(jax.tree.leaves(updates[PENALTIES]))
        pairs = [(out, its["out"]), (penalty, its["penalty"]), *((statistics[x], its[x]) for x in ("mean", "var"))]
        worst = max(worst, *(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs))
    return worst


def theirs(name: str, asked: Json) -> Json:
    """A record of all seeds with PyTorch's batch norm, or with the authors' layers."""
    runs = [json.loads(line) for line in peer("adab2n_accuracy", json.dumps({**asked, "norm": name}))]
    accuracy = [run["accuracy"] / 100 for run in runs]
    print(f"theirs, {name}: {report.spread(accuracy)} %", flush=True)
    return {"row": name, "average_accuracy": accuracy, "seconds": [run["seconds"] for run in runs]}


def peer(module: str, request: str, *arguments: str) -> list[str]:
    """What a program of `experiments/bench/peers` answers, line by line.

    Raises:
      UserError: it failed.
    """
    command = [PEER_PYTHON.value, "-m", f"experiments.bench.peers.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, input=request, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-300:]}")
    return done.stdout.splitlines()


if __name__ == "__main__":
    cli.run(main)
