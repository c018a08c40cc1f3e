"""How much faster several seeds train as one program than one after the other.

    python -m experiments.bench.seeds --config=configs/digits.py [--seeds=5] [--rounds=2] [--devices=1] [--json=FILE]

Both ways in this one process, in turn, in new folders, `rounds` times; whole runs, with what they compile, evaluate and save.
`whole` is the ratio of wall seconds, `steps` that of the phases of the steps alone (load, train), which longer runs tend to;
both are medians over the rounds, with each round beside them. Above 1: together is faster.
"""

import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

from absl import flags

from experiments import cli
from experiments.bench.environment import environment
from jaxcl.errors import UserError
from jaxcl.runs.steps import STEPPING
from jaxcl.search.seeds import check_together, train_seeds

ROUNDS = flags.DEFINE_integer("rounds", 2, "measurements of each way")


def main() -> None:
    config = cli.required(cli.CONFIG)
    count = cli.seeds(default=5, least=2)
    if ROUNDS.value < 1:
        raise UserError(f"--rounds: {ROUNDS.value} is not allowed, give at least 1")
    check_together(config)
    rounds: dict[str, list[dict[str, float]]] = {"alone": [], "together": []}
    for _ in range(ROUNDS.value):
        for way, measured in rounds.items():
            with tempfile.TemporaryDirectory() as folder:
                measured.append(measure(config, pathlib.Path(folder), count, way == "together"))
    alone, together = rounds["alone"], rounds["together"]
    ratios = {name: [a[name] / b[name] for a, b in zip(alone, together, strict=True)] for name in ("whole", "steps")}
    found = {
        "name": config.name,
        "strategy": config.strategy,
        "seeds": count,
        "speed_up": {name: {"median": statistics.median(x), "rounds": x} for name, x in ratios.items()},
        "seconds": rounds,
        **environment(),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if cli.JSON.value:
        pathlib.Path(cli.JSON.value).write_text(text + "\n")


def measure(config: Any, folder: pathlib.Path, count: int, together: bool) -> dict[str, float]:
    """Seconds of all seeds: of the whole, and of the phases of the steps."""
    folders = {seed: folder / str(seed) for seed in range(config.seed, config.seed + count)}
    begin = time.perf_counter()
    results = train_seeds(config, folders, together=together, progress=False)
    whole = time.perf_counter() - begin
    steps = [sum(result["seconds_by_phase"].get(name, 0.0) for name in STEPPING) for result in results]
    return {"whole": whole, "steps": steps[0] if together else sum(steps)}


if __name__ == "__main__":
    cli.run(main)
