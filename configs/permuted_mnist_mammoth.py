"""Permuted-MNIST as Mammoth runs it, one row of docs/benchmarks.md each: STRATEGY or STRATEGY-CAPACITY, for example er-500.

    python -m experiments.train --config=configs/permuted_mnist_mammoth.py:er-500 --config.data.data_dir=TFDS_DIR --workdir=DIR
    python -m experiments.studies.references --protocol=permuted_mnist_mammoth --data_dir=TFDS_DIR --workdir=DIR

10 tasks, each all of MNIST under a permutation of its own; one epoch in batches of 128 + 128, an MLP of 2 x 100 with
Xavier-uniform weights, SGD without momentum, images in 0..1, a reservoir; Mammoth's learning rates and coefficients.
Data: `tfds:mnist`, prepared in TFDS_DIR (TFDS's default folder if not given), or `--config.data.source=npz:FILE`.
"""

from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.training.config import default_config

# row: learning rate, options of the strategy
ROWS: dict[str, tuple[float, dict[str, float]]] = {
    "incremental": (0.2, {}),
    "er-500": (0.2, {}),
    "ewc": (0.1, {"strength": 0.7, "gamma": 1.0}),
}


def get_config(row: str = "er-500") -> ConfigDict:
    if row not in ROWS:
        raise UserError(
            f"--config=configs/permuted_mnist_mammoth.py:{row}: no such row, choose one of {', '.join(ROWS)}"
        )
    strategy, _, capacity = row.partition("-")
    learning_rate, options = ROWS[row]
    config = default_config()
    config.name = f"Permuted-MNIST, Mammoth's protocol, {row}"
    config.strategy = strategy
    if options:
        config.strategies[strategy].update(options)
    config.batch_size = 128
    config.log_every = 500
    config.data.source = "tfds:mnist"
    config.data.scenario = "permuted"
    config.data.tasks = 10
    config.model.name = "mlp"
    config.model.options = {"hidden": (100, 100), "kernel_init": "xavier"}
    config.optimizer.learning_rate = learning_rate
    config.buffer.capacity = int(capacity or 500)
    config.buffer.policy = "reservoir"
    config.buffer.representatives = 128
    config.buffer.candidates = 128
    config.eval.batch_size = 1000
    return config
