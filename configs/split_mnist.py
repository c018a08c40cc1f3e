"""Split-MNIST, class-incremental: 5 tasks of 2 classes, one pass over the data, an MLP of 2 x 100.

    python -m experiments.compare --config=configs/split_mnist.py --workdir=runs/split_mnist --devices=8 --seeds=3

Data: `tfds:mnist`, prepared in TFDS's default folder or in `--config.data.data_dir`, or `--config.data.source=npz:FILE`.
Expected: docs/configs.md.
"""

from ml_collections import ConfigDict

from jaxcl.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.name = "Split-MNIST, 5 x 2 classes"
    config.batch_size = 32
    config.epochs = 1
    config.data.source = "tfds:mnist"
    config.data.tasks = 5
    config.model.name = "mlp"
    config.model.options = {"hidden": (100, 100)}
    config.loss.prior = "balanced"
    config.optimizer.learning_rate = 0.1
    config.buffer.capacity = 1000
    config.buffer.policy = "class_random"
    config.buffer.representatives = 32
    config.buffer.candidates = 8
    return config
