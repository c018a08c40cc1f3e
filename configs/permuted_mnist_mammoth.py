"""Permuted-MNIST as Mammoth runs it, one row of docs/benchmarks.md each: STRATEGY or STRATEGY-CAPACITY, for example er-500.

    python -m experiments.train --config=configs/permuted_mnist_mammoth.py:er-500 --config.data.data_dir=TFDS_DIR --workdir=DIR
    python -m experiments.studies.references --protocol=permuted_mnist_mammoth --data_dir=TFDS_DIR --workdir=DIR

10 tasks, each all of MNIST under a permutation of its own; one epoch in batches of 128 + 128, an MLP of 2 x 100 with
Xavier-uniform weights, SGD without momentum, images in 0..1, a reservoir; Mammoth's learning rates and coefficients.
Data: `tfds:mnist`, prepared in TFDS_DIR (TFDS's default folder if not given), or `--config.data.source=npz:FILE`.
"""

from ml_collections import ConfigDict

from jaxcl import shipped

ROWS: dict[str, tuple[float, dict[str, float]]] = {
    "incremental": (0.2, {}),
    "er-500": (0.2, {}),
    "ewc": (0.1, {"strength": 0.7, "gamma": 1.0}),
}


def get_config(row: str = "er-500") -> ConfigDict:
    config = shipped.load("split_mnist_mammoth").protocol(
        "permuted_mnist_mammoth", ROWS, row, batch_size=128, capacity=500
    )
    config.name = f"Permuted-MNIST, Mammoth's protocol, {row}"
    config.log_every = 500
    config.data.source = "tfds:mnist"
    config.data.scenario = "permuted"
    config.data.tasks = 10
    return config
