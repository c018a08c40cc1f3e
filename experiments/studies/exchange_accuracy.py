"""What the exchange does to accuracy when shards are unequal and skewed by class.

    python -m experiments.studies.exchange_accuracy --config=configs/split_mnist.py --workdir=DIR --devices=8 \\
        --json=experiments/results/exchange_accuracy.json

Every batch is handed to the devices sorted by class (`data.placement = "by_class"`), so that a device sees one class of two in
most tasks and its shard holds other classes, and another number of rows, than its neighbours'. `mix` and `balance` replay a
uniform sample of the union all the same; `local` replays what each shard holds. Per-device batch statistics
(`--config.model.options.norm=local`) then see what one device holds, which is what a uniform sample on every device is for.
"""

import json
import pathlib

import numpy as np
from absl import flags

from experiments import cli
from experiments.bench.harness import environment
from jaxcl.buffer import EXCHANGES
from jaxcl.training.loop import train_and_evaluate

MODELS = flags.DEFINE_list("models", ["mlp", "convnet"], "models to train: mlp, convnet (batch statistics per device)")


def main() -> None:
    config, workdir = cli.required(cli.CONFIG), pathlib.Path(cli.required(cli.WORKDIR))
    settings = []
    for model in MODELS.value:
        for exchange in EXCHANGES:
            runs = []
            for seed in range(config.seed, config.seed + cli.seeds(default=3)):
                one = config.copy_and_resolve_references()
                one.strategy, one.seed, one.data.placement, one.buffer.exchange = "er", seed, "by_class", exchange
                if model == "convnet":
                    one.model.name, one.model.options = "convnet", {"width": 8, "norm": "local"}
                    one.optimizer.learning_rate = 0.05
                runs.append(train_and_evaluate(one, workdir / model / exchange / f"seed_{seed}"))
            accuracy = np.array([run["average_accuracy"] for run in runs])
            settings.append(
                {
                    "model": model,
                    "exchange": exchange,
                    "average_accuracy": {
                        "mean": accuracy.mean(),
                        "std": accuracy.std(ddof=1) if len(runs) > 1 else None,
                    },
                    "accuracies": accuracy.tolist(),
                    "rows_per_shard": runs[0]["buffer"]["rows_per_shard"],
                    "traffic": runs[0]["buffer"]["traffic"],
                    "seconds": [run["seconds"] for run in runs],
                }
            )
            traffic = runs[0]["buffer"]["traffic"]
            print(
                f"{model:8s} {exchange:8s} average accuracy {100 * accuracy.mean():.2f} +- {100 * accuracy.std(ddof=1):.2f} %"
                f"  rows a shard {min(settings[-1]['rows_per_shard'])}..{max(settings[-1]['rows_per_shard'])}"
                f"  moved a draw and device: {traffic['rows_moved']} rows, {traffic['bytes_moved']} bytes",
                flush=True,
            )
    if cli.JSON.value:
        pathlib.Path(cli.JSON.value).write_text(json.dumps({"settings": settings, **environment()}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
