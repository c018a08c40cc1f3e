"""MNIST and the names of its classes as text: zero-shot classification, as retrieval of "a picture of 7".

    python -m experiments.pairs --config=configs/memory_bank_mnist.py --config.data.data_dir=TFDS_DIR --workdir=DIR

Rows of one class match each other and are no negatives of each other, so that a batch of 64 has about 58 for an anchor. Any
labelled source will do: `--config.data.source=npz:FILE`, or `tfds:tinyimagenet32` for 200 classes.
"""

from ml_collections import ConfigDict

from jaxcl.contrastive.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.name = "MNIST and its classes' names"
    config.data.source = "tfds:mnist"
    config.batch_size = 64
    config.epochs = 4
    config.momentum = 0.99
    config.bank.start = 0.5
    config.model.image_width = 8
    return config
