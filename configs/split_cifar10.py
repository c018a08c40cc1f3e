"""Split-CIFAR-10, class-incremental: 5 tasks of 2 classes, ResNet-18; on a CPU a small convolutional net and fewer epochs.

    python -m experiments.compare --config=configs/split_cifar10.py --workdir=DIR
    python -m experiments.compare --config=configs/split_cifar10.py:cpu --workdir=DIR --devices=8

Data: `tfds:cifar10`, prepared in TFDS's default folder or in `--config.data.data_dir`, or `--config.data.source=npz:FILE`.
Expected: docs/configs.md. On a GPU not run yet.
"""

from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.training.config import default_config

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2615)  # of the training images in 0..1


def get_config(size: str = "gpu") -> ConfigDict:
    if size not in ("gpu", "cpu"):
        raise UserError(f"--config=configs/split_cifar10.py:{size}: no such size, choose gpu or cpu")
    config = default_config()
    config.name = f"Split-CIFAR-10, 5 x 2 classes ({size} size)"
    config.data.source = "tfds:cifar10"
    config.data.tasks = 5
    config.data.augment = ("crop", "flip")
    config.data.mean, config.data.std = MEAN, STD
    config.loss.prior = "balanced"
    config.buffer.capacity = 5000  # 10 % of the training set
    config.buffer.policy = "class_random"
    if size == "gpu":
        config.batch_size = 128
        config.epochs = 20
        config.model.name = "resnet18"
        config.model.options = {"width": 64, "norm": "sync"}
        config.model.dtype = "bfloat16"
        config.optimizer.learning_rate = 0.1
        config.optimizer.momentum = 0.9
        config.optimizer.weight_decay = 5e-4
        config.optimizer.schedule = "cosine"
        config.optimizer.warmup_epochs = 1.0
        config.buffer.representatives = 128
        config.buffer.candidates = 32
    else:
        config.batch_size = 64
        config.epochs = 2
        config.data.threads = 1
        config.model.name = "convnet"
        config.model.options = {"width": 16, "norm": "sync"}
        config.optimizer.learning_rate = 0.05
        config.optimizer.momentum = 0.9
        config.buffer.representatives = 64
        config.buffer.candidates = 16
    return config
