"""How much faster several seeds train as one program than one after the other.

    python -m experiments.bench.seeds --config=configs/digits.py [--seeds=5] [--rounds=2] [--devices=1] [--json=FILE]

Both ways in this one process, in turn, in new folders; whole runs, with what they compile, evaluate and save. `whole` is the
ratio of wall seconds, `steps` that of the phases of the steps alone (load, train), which longer runs tend to; both are medians
over the rounds, with each round beside them. Above 1: together is faster.
"""

import pathlib
import statistics
import tempfile
import time
from typing import Annotated

from ml_collections import ConfigDict

from experiments.bench import harness
from experiments.pages.page import Json
from jaxcl import cli
from jaxcl.runs.steps import STEPPING
from jaxcl.search.seeds import check_together, train_seeds


def measure(*, rounds: Annotated[int, "measurements of each way"] = 2) -> Json:
    config, count = cli.required(cli.CONFIG), cli.seeds(default=5, least=2)
    check_together(config)
    seconds: dict[str, list[dict[str, float]]] = {"alone": [], "together": []}
    for _ in range(rounds):
        for way, found in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                found.append(one_round(config, pathlib.Path(folder), count, way == "together"))
    pairs = list(zip(seconds["alone"], seconds["together"], strict=True))
    ratios = {name: [a[name] / b[name] for a, b in pairs] for name in ("whole", "steps")}
    return {
        "name": config.name,
        "strategy": config.strategy,
        "seeds": count,
        "speed_up": {name: {"median": statistics.median(x), "rounds": x} for name, x in ratios.items()},
        "seconds": seconds,
    }


def one_round(config: ConfigDict, folder: pathlib.Path, count: int, together: bool) -> dict[str, float]:
    """Seconds of all seeds: of the whole, and of the phases of the steps."""
    folders = {seed: folder / str(seed) for seed in range(config.seed, config.seed + count)}
    begin = time.perf_counter()
    results = train_seeds(config, folders, together=together, progress=False)
    whole = time.perf_counter() - begin
    steps = [sum(result["seconds_by_phase"].get(name, 0.0) for name in STEPPING) for result in results]
    return {"whole": whole, "steps": steps[0] if together else sum(steps)}


if __name__ == "__main__":
    harness.run(measure)
