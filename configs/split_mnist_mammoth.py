"""Split-MNIST as Mammoth runs it, one row of docs/benchmarks.md each: STRATEGY or STRATEGY-CAPACITY, for example der_pp-200.

    python -m experiments.train --config=configs/split_mnist_mammoth.py:er-200 --config.data.data_dir=TFDS_DIR --workdir=DIR
    python -m experiments.studies.references --protocol=split_mnist_mammoth --data_dir=TFDS_DIR --workdir=DIR

5 tasks of 2 classes, one epoch in batches of 10 + 10, an MLP of 2 x 100 with Xavier-uniform weights, SGD without momentum,
images in 0..1, a reservoir; learning rates and coefficients are those of Mammoth's best arguments.
Data: `tfds:mnist`, prepared in TFDS_DIR (TFDS's default folder if not given), or `--config.data.source=npz:FILE`.
Time: the last column of the table in docs/benchmarks.md.
"""

from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.training.config import default_config

Rows = dict[str, tuple[float, dict[str, float]]]  # row -> learning rate, options of the strategy

ROWS: Rows = {
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


def protocol(file: str, rows: Rows, row: str, batch_size: int, capacity: int = 0) -> ConfigDict:
    """What the rows of Mammoth's protocols share, of a batch that is replayed as large as it is new; `capacity` of a row that
    names none."""
    if row not in rows:
        raise UserError(f"--config=configs/{file}.py:{row}: no such row, choose one of {', '.join(rows)}")
    config = default_config()
    config.strategy, _, named = row.partition("-")
    config.optimizer.learning_rate, options = rows[row]
    if options:
        config.strategies[config.strategy].update(options)
    config.batch_size = config.buffer.representatives = config.buffer.candidates = batch_size
    config.buffer.capacity = int(named or capacity)
    config.buffer.policy = "reservoir"
    config.eval.batch_size = 1000
    config.model.name = "mlp"
    config.model.options = {"hidden": (100, 100), "kernel_init": "xavier"}
    return config


def get_config(row: str = "er-200") -> ConfigDict:
    config = protocol("split_mnist_mammoth", ROWS, row, batch_size=10, capacity=200)
    config.name = f"Split-MNIST, Mammoth's protocol, {row}"
    config.log_every = 500
    config.data.source = "tfds:mnist"
    config.data.tasks = 5
    return config
