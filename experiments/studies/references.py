"""Runs our side of a published protocol and sets it beside the reference: JSON in experiments/results, docs/benchmarks.md.

    python -m experiments.studies.references --protocol=split_mnist_mammoth --workdir=DIR [--data_dir=TFDS_DIR]
        [--source=npz:FILE] [--rows=er-200,der-200] [--seeds=5]
    python -m experiments.studies.references --protocol=split_cifar10_small --source=npz:FILE --mammoth=CHECKOUT
        [--peer_python=PEERS_ENV/bin/python]      # the reference's side, by experiments/bench/peers/mammoth_accuracy.py
    python -m experiments.studies.references        # only fills docs/benchmarks.md anew, from the JSON files

The rows of a protocol are those of configs/PROTOCOL.py. What the reference reached stands in
experiments/results/PROTOCOL.reference.json.
"""

import importlib
import json
import pathlib
import subprocess
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from scipy import stats

from experiments.pages import page
from experiments.pages.page import Json
from experiments.studies.grid import PEER_PYTHON, ROWS, Grid
from experiments.studies.mammoth import mammoth_protocol
from jaxcl import cli, summaries
from jaxcl.errors import UserError

PAGE = page.ROOT / "docs" / "benchmarks.md"
SEEDS = 10  # of each row, from 0; fixed before any row is run
MARGIN = 2.0  # points of accuracy; two programs whose means differ by less are equivalent
LEVEL = 0.05

PROTOCOL = flags.DEFINE_string("protocol", None, "a config file of configs/ with rows, without .py")
SOURCE = flags.DEFINE_string("source", None, "config.data.source, where the protocol's own is not to be used")
DATA_DIR = flags.DEFINE_string("data_dir", None, "config.data.data_dir")
MAMMOTH = flags.DEFINE_string("mammoth", None, "a checkout of Mammoth: runs the reference's side instead of ours")


def main() -> None:
    if PROTOCOL.value is not None:
        if not (page.ROOT / "configs" / f"{PROTOCOL.value}.py").is_file():
            raise UserError(f"--protocol: there is no configs/{PROTOCOL.value}.py")
        seeds = list(range(cli.seeds(SEEDS, least=2)))  # a deviation needs two
        if MAMMOTH.value is None:
            run_ours(PROTOCOL.value, pathlib.Path(cli.required(cli.WORKDIR)), seeds)
        else:
            run_reference(PROTOCOL.value, MAMMOTH.value, seeds)
    write()
    print(PAGE.relative_to(page.ROOT))


def run_ours(protocol: str, workdir: pathlib.Path, seeds: list[int]) -> None:
    """Runs the rows asked for and puts them into the protocol's JSON file, beside those already there."""
    module = importlib.import_module(f"configs.{protocol}")
    for row in ROWS.value or module.ROWS:
        one = Grid(config_of(module, row), workdir, options={"progress": False})
        runs = [one.runs(row, {"seed": seed, "data.scenario_seed": seed}, seeds=1)[0] for seed in seeds]
        found = summary(runs)
        print(f"{row}: {figure(found)}", flush=True)
        rows = ours_of(protocol) | {row: found}
        path = page.RESULTS / f"{protocol}.json"
        path.write_text(page.as_json({name: rows[name] for name in module.ROWS if name in rows}))


def run_reference(protocol: str, checkout: str, seeds: list[int]) -> None:
    """Runs Mammoth on the rows asked for and puts them into the reference's JSON file."""
    module = importlib.import_module(f"configs.{protocol}")
    for row in ROWS.value or module.ROWS:
        asked = {**mammoth_protocol(config_of(module, row)), "path": checkout, "seeds": seeds}
        command = [PEER_PYTHON.value, "-m", "experiments.bench.peers.mammoth_accuracy"]
        done = subprocess.run(command, cwd=page.ROOT, input=json.dumps(asked), stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"--mammoth: the run of {row} ended with status {done.returncode}")
        runs = [json.loads(line) for line in done.stdout.splitlines()]
        found = accuracies([100 * run["accuracy"] for run in runs]) | {"version": runs[0]["version"]}
        print(f"{row}: {figure(found)}", flush=True)
        reference = page.load(f"{protocol}.reference")
        reference["rows"][row] = found
        (page.RESULTS / f"{protocol}.reference.json").write_text(page.as_json(reference))


def config_of(module: Any, row: str) -> ConfigDict:
    config = module.get_config(row)
    config.data.source = SOURCE.value or config.data.source
    config.data.data_dir = DATA_DIR.value
    return config


def accuracies(accuracy: list[float]) -> Json:
    """Final accuracy of each seed in percent, their mean and sample deviation."""
    mean, deviation = summaries.mean_and_deviation(accuracy)
    return {"accuracy": [round(a, 3) for a in accuracy], "mean": round(mean, 3), "std": round(deviation, 3)}


def summary(runs: list[Json]) -> Json:
    """What is kept of the runs of one row."""
    return accuracies([100 * run["average_accuracy"] for run in runs]) | {
        "seconds": round(float(np.median([run["seconds"] for run in runs])), 1),
        "devices": runs[0]["devices"],
        "versions": runs[0]["versions"],
    }


def figure(row: Json) -> str:
    return f"{row['mean']:.2f} ± {row['std']:.2f}"


def ours_of(protocol: str) -> Json:
    """Row -> what ours reached; {} before the first run."""
    return page.load(protocol) if (page.RESULTS / f"{protocol}.json").is_file() else {}


def tables() -> dict[str, str]:
    """Protocol -> its table, of every protocol that has a reference."""
    names = sorted(path.name.removesuffix(".reference.json") for path in page.RESULTS.glob("*.reference.json"))
    references = {name: page.load(f"{name}.reference") for name in names}
    return {name: table(x["rows"], ours_of(name), x["seeds"]) for name, x in references.items()}


def table(reference: Json, ours: Json, seeds: int) -> str:
    rows: list[tuple[Any, ...]] = []
    for name, theirs in reference.items():
        row, count = ours.get(name), len(theirs.get("accuracy", ())) or seeds
        if row is None:
            rows.append((name, figure(theirs), count, "not run", "", "", "", "", ""))
            continue
        found = compared(theirs | {"seeds": count}, row | {"seeds": len(row["accuracy"])})
        interval = f"{found['difference']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"
        verdict = "yes" if found["p"] < LEVEL else "not shown"
        cells = figure(theirs), count, figure(row), len(row["accuracy"]), interval, f"{found['p']:.2g}", verdict
        rows.append((name, *cells, row["seconds"]))
    head = ("row", "reference", "seeds", "ours", "seeds", "difference (90 %)", "p", "equivalent", "s a run")
    return page.table(head, rows)


def compared(theirs: Json, ours: Json) -> Json:
    """The difference of two means with its 90 % interval, and whether it lies within `MARGIN`: two one-sided tests.

    Schuirmann 1987; Welch's t-test at each border, since the deviations differ. `p` is the larger of the two: below 0.05
    exactly if the interval lies within the margin.

    Args:
      theirs, ours: mean, std (of the sample) and seeds, at least two.
    """
    errors = [one["std"] ** 2 / one["seeds"] for one in (theirs, ours)]
    freedom = sum(errors) ** 2 / sum(e**2 / (one["seeds"] - 1) for e, one in zip(errors, (theirs, ours), strict=True))
    difference, error = ours["mean"] - theirs["mean"], sum(errors) ** 0.5
    half = stats.t.ppf(1 - LEVEL, freedom) * error
    p = stats.t.cdf((abs(difference) - MARGIN) / error, freedom)
    return {"difference": difference, "low": difference - half, "high": difference + half, "p": float(p)}


def write() -> None:
    page.fill(PAGE, tables())


if __name__ == "__main__":
    cli.run(main)
