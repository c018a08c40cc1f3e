"""Split-MNIST as Mammoth runs it, one row of docs/benchmarks.md each: STRATEGY or STRATEGY-CAPACITY, for example der_pp-200.

    python -m experiments.train --config=configs/split_mnist_mammoth.py:er-200 --config.data.data_dir=TFDS_DIR --workdir=DIR
    python -m experiments.studies.references --protocol=split_mnist_mammoth --data_dir=TFDS_DIR --workdir=DIR

5 tasks of 2 classes, one epoch in batches of 10 + 10, an MLP of 2 x 100 with Xavier-uniform weights, SGD without momentum,
images in 0..1, a reservoir; learning rates and coefficients are those of Mammoth's best arguments.
Data: `tfds:mnist`, prepared in TFDS_DIR (TFDS's default folder if not given), or `--config.data.source=npz:FILE`.
Time: about 10 s a run on one CPU core.
"""

from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.training.config import default_config

# row: learning rate, options of the strategy
ROWS: dict[str, tuple[float, dict[str, float]]] = {
    "incremental": (0.03, {}),
    "joint": (0.03, {}),
    "er-200": (0.01, {}),
    "er-500": (0.1, {}),
    "der-200": (0.03, {"alpha": 0.2}),
    "der-500": (0.03, {"alpha": 1.0}),
    "der_pp-200": (0.03, {"alpha": 0.2, "beta": 1.0}),
    "der_pp-500": (0.03, {"alpha": 1.0, "beta": 0.5}),
    "agem-200": (0.1, {}),
    "agem-500": (0.1, {}),
}


def get_config(row: str = "er-200") -> ConfigDict:
    if row not in ROWS:
        raise UserError(f"--config=configs/split_mnist_mammoth.py:{row}: no such row, choose one of {', '.join(ROWS)}")
    strategy, _, capacity = row.partition("-")
    learning_rate, options = ROWS[row]
    config = default_config()
    config.name = f"Split-MNIST, Mammoth's protocol, {row}"
    config.strategy = strategy
    if options:
        config.strategies[strategy].update(options)
    config.batch_size = 10
    config.log_every = 500
    config.data.source = "tfds:mnist"
    config.data.tasks = 5
    config.model.name = "mlp"
    config.model.options = {"hidden": (100, 100), "kernel_init": "xavier"}
    config.optimizer.learning_rate = learning_rate
    config.buffer.capacity = int(capacity or 200)
    config.buffer.policy = "reservoir"
    config.buffer.representatives = 10
    config.buffer.candidates = 10
    config.eval.batch_size = 1000
    return config
