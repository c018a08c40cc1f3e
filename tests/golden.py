"""Golden figures: what tiny runs of every strategy give on 1 and on 8 devices.

    python -m tests.golden        # writes tests/golden.json anew

Run it only when a change is meant to alter what is trained, and say so in the commit.
"""

import hashlib
import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcl.strategies import STRATEGIES
from jaxcl.training.config import default_config
from jaxcl.training.loop import train_and_evaluate

FILE = pathlib.Path(__file__).with_name("golden.json")
DEVICES = (1, 8)


def tiny(strategy: str) -> ConfigDict:
    """The digits in three tasks, one epoch of seven steps each."""
    config = default_config()
    config.strategy, config.batch_size, config.eval.batch_size, config.log_every = strategy, 64, 256, 1
    config.data.tasks, config.data.threads = 3, 1
    config.model.options = {"hidden": (16,)}
    config.buffer.capacity, config.buffer.representatives = 64, 16
    config.strategies.gdumb.epochs, config.strategies.mir.replayed = 2, 8
    config.strategies.ranpac.dim = 64
    config.checkpoint.every_seconds = 0.0
    return config


def figures(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a finished run in `folder` has left; `arrays` are those of its last checkpoint."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    first = [line for i, line in enumerate(train) if i < 2 or line["task"] != train[i - 1]["task"]]
    result = json.loads((folder / "result.json").read_text())
    ids = arrays.get("buffer.id")
    params = [np.abs(x).sum(dtype=np.float64) for name, x in sorted(arrays.items()) if name.startswith("params.")]
    return {
        "steps": [
            {k: line[k] for k in ("step", "loss", "accuracy", "replay_accuracy", "rows", "replayed") if k in line}
            for line in first
        ],
        "accuracy_matrix": result["accuracy_matrix"],
        "parameters": float(sum(params)),
        "stored": None
        if ids is None
        else hashlib.sha256(np.sort(ids[ids >= 0]).astype("<i4").tobytes()).hexdigest()[:16],
    }


def digest(arrays: dict[str, np.ndarray]) -> str:
    """Of every bit of a state."""
    found = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        found.update(name.encode() + np.ascontiguousarray(x).tobytes())
    return found.hexdigest()[:16]


def run(strategy: str, devices: int, folder: pathlib.Path) -> tuple[dict[str, Any], str]:
    from tests.whole import last

    train_and_evaluate(tiny(strategy), folder, devices=jax.devices()[:devices], progress=False)
    arrays = last(folder)[1]
    return figures(folder, arrays), digest(arrays)


def main() -> None:
    from jaxcl.mesh import use_fake_devices

    use_fake_devices(max(DEVICES))
    found, bits = {}, {}
    for strategy in STRATEGIES:
        for devices in DEVICES:
            with tempfile.TemporaryDirectory() as folder:
                key = f"{strategy}/{devices}"
                found[key], bits[key] = run(strategy, devices, pathlib.Path(folder) / "run")
                print(key, bits[key], flush=True)
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    if len(sys.argv) > 1:
        pathlib.Path(sys.argv[1]).write_text(json.dumps(bits, indent=1))


if __name__ == "__main__":
    main()
