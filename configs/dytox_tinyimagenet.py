"""DyTox on 100 classes of Tiny-ImageNet at 32x32, 10 tasks of 10, on a GPU; `:cpu` is a tiny form of it.

    python -m experiments.train --config=configs/dytox_tinyimagenet.py --config.data.data_dir=TFDS_DIR --workdir=DIR

The settings are those of configs/dytox_cifar100.py, which is the paper's protocol; the data are the first 100 classes of
`tfds:tinyimagenet32` (a prepared folder of 100,000 / 10,000 JPEG images; or `--config.data.source=npz:FILE`), 500 / 50 images a
class as in CIFAR-100. Not run yet at this size: no accuracy is claimed.

`:cpu` trains 5 tasks of 2 classes, a narrow net of 2 blocks and one pass over each task, to see that all parts work together;
its accuracy says nothing.
"""

from ml_collections import ConfigDict

from jaxcl import shipped
from jaxcl.errors import UserError


def get_config(size: str = "gpu") -> ConfigDict:
    if size not in ("gpu", "cpu"):
        raise UserError(f"--config=configs/dytox_tinyimagenet.py:{size}: no such size, choose gpu or cpu")
    config = shipped.load("dytox_cifar100").get_config()
    config.name = "DyTox, Tiny-ImageNet 32x32, 10 x 10 classes"
    config.data.source = "tfds:tinyimagenet32"
    each = 10 if size == "gpu" else 2
    with config.ignore_type():  # a list of classes where the default is a number of tasks
        config.data.tasks = tuple(
            tuple(range(begin, begin + each)) for begin in range(0, 100 if each == 10 else 10, each)
        )
    if size == "cpu":
        config.name = "DyTox, Tiny-ImageNet 32x32, 5 x 2 classes, narrow (cpu size)"
        config.data.threads = 1
        config.batch_size, config.epochs, config.eval.batch_size = 64, 1, 64
        config.model.options = {"width": 48, "depth": 2, "heads": 4, "patch": 8}
        config.optimizer.learning_rate, config.optimizer.warmup_epochs = 1e-3, 0.0
        config.buffer.capacity = 80
        config.finetune.epochs, config.finetune.learning_rate = 2, 1e-4
        config.finetune.frozen = ("patch_embed", "pos_embed", "block_0", "block_1")
    return config
