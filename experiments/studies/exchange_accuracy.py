"""What the exchange does to accuracy when shards are unequal and skewed by class.

    python -m experiments.studies.exchange_accuracy --config=configs/split_mnist.py --workdir=DIR --devices=8 \\
        --json=experiments/results/exchange_accuracy.json [--models=mlp,convnet] [--seeds=3]

Every batch is handed to the devices sorted by class (`data.placement = "by_class"`). So a device sees one class of two in most
tasks, and its shard holds other classes, and another number of rows, than its neighbours'. `mix` and `balance` still replay a
uniform sample of the union. `local` replays what each shard holds. The convolutional net has batch statistics per device, which
need a uniform sample on every device.
"""

from collections.abc import Iterator

from experiments.pages.page import Json
from experiments.studies import grid
from experiments.studies.grid import Setting
from jaxcl import cli, report, summaries
from jaxcl.buffer import EXCHANGES
from jaxcl.check import check, one_of

MODELS: dict[str, Json] = {
    "mlp": {},
    "convnet": {
        "model.name": "convnet",
        "model.options": {"width": 8, "norm": "local"},
        "optimizer.learning_rate": 0.05,
    },
}


def settings(models: list[str]) -> Iterator[Setting]:
    for model in models or MODELS:
        check("--models", model, one_of(MODELS))
        for exchange in EXCHANGES:
            fields = {"strategy": "er", "data.placement": "by_class", "buffer.exchange": exchange}
            yield Setting(f"{model}/{exchange}", fields | MODELS[model], {"model": model, "exchange": exchange})


def summary(runs: list[Json]) -> Json:
    accuracies = [run["average_accuracy"] for run in runs]
    mean, deviation = summaries.mean_and_deviation(accuracies)
    return {
        "average_accuracy": {"mean": mean, "std": deviation if len(runs) > 1 else None},
        "accuracies": accuracies,
        **{name: runs[0]["buffer"][name] for name in ("rows_per_shard", "traffic")},
        "seconds": [run["seconds"] for run in runs],
    }


def said(record: Json) -> str:
    return f"{report.spread(record['accuracies'])} %, {record['traffic']['rows_moved']} rows moved a draw and device"


def main() -> None:
    found = grid.from_flags(seeds=3).records(settings(grid.MODELS.value), summary, said)
    if cli.JSON.value:
        grid.write(cli.JSON.value, {"settings": found})


if __name__ == "__main__":
    cli.run(main)
