"""Runs our side of a published protocol and sets it beside the reference: JSON in experiments/results, docs/benchmarks.md.

    python -m experiments.studies.references --protocol=split_mnist_mammoth --workdir=DIR [--data_dir=TFDS_DIR]
        [--source=npz:FILE] [--rows=er-200,der-200] [--seeds=5]
    python -m experiments.studies.references --protocol=split_cifar10_small --source=npz:FILE --mammoth=CHECKOUT
        [--peer_python=PEERS_ENV/bin/python]      # the reference's side, by experiments/peers/mammoth_accuracy.py
    python -m experiments.studies.references        # only writes docs/benchmarks.md anew, from the JSON files

The rows of a protocol are those of configs/PROTOCOL.py; what the reference reached stands in
experiments/results/PROTOCOL.reference.json. Each run has its own folder, DIR/ROW/seed_SEED; finished ones are not run again.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import cli
from jaxcl import data, summaries
from jaxcl.errors import UserError
from jaxcl.training.loop import train_and_evaluate

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "experiments" / "results", ROOT / "docs" / "benchmarks.md"

PROTOCOL = flags.DEFINE_string("protocol", None, "a config file of configs/ with rows, without .py")
SOURCE = flags.DEFINE_string("source", None, "config.data.source, where the protocol's own is not to be used")
DATA_DIR = flags.DEFINE_string("data_dir", None, "config.data.data_dir")
ROWS = flags.DEFINE_list("rows", [], "rows to run; all of them if not given")
SEEDS = 5  # of each row, from 0
MAMMOTH = flags.DEFINE_string("mammoth", None, "a checkout of Mammoth: runs the reference's side instead of ours")
PEER_PYTHON = flags.DEFINE_string("peer_python", sys.executable, "interpreter that has PyTorch, with --mammoth")


def main() -> None:
    if PROTOCOL.value is not None:
        if not (ROOT / "configs" / f"{PROTOCOL.value}.py").is_file():
            raise UserError(f"--protocol: there is no configs/{PROTOCOL.value}.py")
        cli.seeds(SEEDS, least=2)  # a deviation needs two
        if MAMMOTH.value is None:
            check(PROTOCOL.value, pathlib.Path(cli.required(cli.WORKDIR)))
        else:
            run_reference(PROTOCOL.value, MAMMOTH.value)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(RESULTS))
    print(PAGE.relative_to(ROOT))


def check(protocol: str, workdir: pathlib.Path) -> None:
    """Runs the rows asked for and puts them into the protocol's JSON file, beside those already there."""
    module = importlib.import_module(f"configs.{protocol}")
    for row in ROWS.value or module.ROWS:
        runs = []
        for seed in range(cli.seeds(SEEDS)):
            config = config_of(module, row)
            config.seed = config.data.scenario_seed = seed
            runs.append(train_and_evaluate(config, workdir / row / f"seed_{seed}", progress=False))
        found = summary(runs)
        print(f"{row}: {figure(found)}", flush=True)
        path = RESULTS / f"{protocol}.json"
        rows = json.loads(path.read_text()) if path.is_file() else {}
        rows[row] = found
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({name: rows[name] for name in module.ROWS if name in rows}, indent=1) + "\n")


def config_of(module: Any, row: str) -> ConfigDict:
    config = module.get_config(row)
    config.data.source = SOURCE.value or config.data.source
    config.data.data_dir = DATA_DIR.value
    return config


def run_reference(protocol: str, checkout: str) -> None:
    """Runs Mammoth on the rows asked for and puts them into the reference's JSON file."""
    module = importlib.import_module(f"configs.{protocol}")
    path = RESULTS / f"{protocol}.reference.json"
    for row in ROWS.value or module.ROWS:
        asked = {
            **mammoth_protocol(config_of(module, row)),
            "path": checkout,
            "seeds": list(range(cli.seeds(SEEDS))),
        }
        command = [PEER_PYTHON.value, "-m", "experiments.bench.peers.mammoth_accuracy"]
        done = subprocess.run(command, cwd=ROOT, input=json.dumps(asked), stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"--mammoth: the run of {row} ended with status {done.returncode}")
        runs = [json.loads(line) for line in done.stdout.splitlines()]
        found = accuracies([100 * run["accuracy"] for run in runs]) | {"version": runs[0]["version"]}
        print(f"{row}: {figure(found)}", flush=True)
        reference = json.loads(path.read_text())
        reference["rows"][row] = found
        path.write_text(json.dumps(reference, indent=1, ensure_ascii=False) + "\n")


def mammoth_protocol(config: ConfigDict) -> dict[str, Any]:
    """A row's config in the words of `experiments/peers/mammoth_accuracy.py`."""
    kind, _, file = config.data.source.partition(":")
    if kind != "npz":
        raise UserError(f"--source: {config.data.source} is not allowed with --mammoth, give npz:FILE")
    train, test = data.open_source(config.data.source)
    if config.data.scenario not in ("class", "permuted"):
        raise UserError(f"--protocol: data.scenario = {config.data.scenario} is not known to the reference's side")
    scenario, _, _ = data.make_scenario(train, test, config.data.scenario, config.data.tasks)
    return {
        "data": os.path.abspath(file),
        "strategy": config.strategy,
        "options": dict(config.strategies.get(config.strategy, {})),
        "capacity": config.buffer.capacity,
        "replayed": config.buffer.representatives,
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "learning_rate": config.optimizer.learning_rate,
        "momentum": config.optimizer.momentum,
        "model": {"name": config.model.name, **config.model.options},
        "mean": config.data.mean,
        "std": config.data.std,
        "tasks": [list(task.classes) for task in scenario.tasks],
        "permuted": config.data.scenario == "permuted",
    }


def accuracies(accuracy: list[float]) -> dict[str, Any]:
    """Final accuracy of each seed in percent, their mean and sample deviation."""
    mean, deviation = summaries.mean_and_deviation(accuracy)
    return {"accuracy": [round(a, 3) for a in accuracy], "mean": round(mean, 3), "std": round(deviation, 3)}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of the runs of one row."""
    return accuracies([100 * run["average_accuracy"] for run in runs]) | {
        "seconds": round(float(np.median([run["seconds"] for run in runs])), 1),
        "devices": runs[0]["devices"],
        "versions": runs[0]["versions"],
    }


def figure(row: dict[str, Any]) -> str:
    return f"{row['mean']:.2f} ± {row['std']:.2f}"


def page(folder: pathlib.Path) -> str:
    """The whole of docs/benchmarks.md: a table a protocol, from the JSON files in `folder`."""
    parts = [
        "# Benchmarks against references",
        "Written by `python -m experiments.studies.references` from the files in `experiments/results`; do not edit.",
        "Final accuracy in percent: the unweighted mean over tasks after the last, mean ± sample deviation over seeds. A row"
        " *holds* where ours is at least the reference's mean less its deviation.",
    ]
    for path in sorted(folder.glob("*.reference.json")):
        reference = json.loads(path.read_text())
        protocol = path.name.removesuffix(".reference.json")
        ours_path = folder / f"{protocol}.json"
        ours = json.loads(ours_path.read_text()) if ours_path.is_file() else {}
        parts += [f"## {reference['title']}", reference["about"], table(reference["rows"], ours, reference["seeds"])]
        parts += [reference["note"]] if "note" in reference else []
        parts.append(
            f"One row again: `python -m experiments.studies.references --protocol={protocol} --rows=ROW --workdir=DIR`."
        )
    return "\n\n".join(parts) + "\n"


def table(reference: dict[str, Any], ours: dict[str, Any], seeds: int) -> str:
    lines = ["| row | reference | seeds | ours | seeds | holds | s a run |", "|---|---|---|---|---|---|---|"]
    for name, theirs in reference.items():
        row, count = ours.get(name), len(theirs.get("accuracy", ())) or seeds
        if row is None:
            lines.append(f"| {name} | {figure(theirs)} | {count} | not run | | | |")
            continue
        holds = "yes" if row["mean"] >= theirs["mean"] - theirs["std"] else "**no**"
        cells = (name, figure(theirs), count, figure(row), len(row["accuracy"]), holds, row["seconds"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
