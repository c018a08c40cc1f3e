"""The paper's experiment on a stand-in: Tiny-ImageNet at 32x32, 4 tasks of 50 classes, ResNet-18; see paper_imagenet.py.

    python -m experiments.compare --config=configs/paper_tinyimagenet.py --config.data.data_dir=TFDS_DIR --workdir=DIR
    python -m experiments.compare --config=configs/paper_tinyimagenet.py:cpu --config.data.data_dir=TFDS_DIR --workdir=DIR

On a CPU add --devices=8. The protocol is that of 8 of the paper's devices, with the same global sizes (448 new rows, 56
replayed, 112 candidates) on any number of devices; the stem is that for 32x32 images, and images are shifted by up to 4
pixels instead of cut. `--config.buffer.share=0.1` gives the memory 10 % of the training rows instead of 30 %.

`:cpu` is another, much smaller experiment, to see the form of the figures: every tenth class (4 tasks of 5), a convolutional
net of 3 layers, 4 epochs a task. Its accuracy says nothing about the paper's.

Data: `tfds:tinyimagenet32`, a prepared folder of 100,000 / 10,000 JPEG images at 32x32 (`data_dir`), or
`--config.data.source=npz:FILE`. The full size needs a GPU and has not been run yet.
"""

from ml_collections import ConfigDict

from configs.paper_imagenet import protocol
from jaxcl.errors import UserError


def get_config(size: str = "gpu") -> ConfigDict:
    if size not in ("gpu", "cpu"):
        raise UserError(f"--config=configs/paper_tinyimagenet.py:{size}: no such size, choose gpu or cpu")
    config = protocol(devices=8)
    config.data.source = "tfds:tinyimagenet32"
    config.data.augment = ("crop", "flip")
    if size == "gpu":
        config.name = "Tiny-ImageNet 32x32, 4 x 50 classes, resnet18"
        config.model.name = "resnet18"
        config.model.options = {"stem": "small", "norm": "local"}
    else:
        config.name = "Tiny-ImageNet 32x32, every tenth class, 4 x 5 classes, small net (cpu size)"
        with config.ignore_type():  # a list of classes where the default is a number of tasks
            config.data.tasks = tuple(tuple(range(50 * task, 50 * task + 50, 10)) for task in range(4))
        config.data.threads = 1
        config.batch_size, config.buffer.representatives, config.buffer.candidates = 64, 8, 16
        config.epochs = 4
        config.model.name = "convnet"
        config.model.dtype = "float32"
        config.model.options = {"width": 16, "norm": "sync"}
        config.optimizer.learning_rate = 0.05
        config.optimizer.warmup_epochs = 1.0
        config.optimizer.decay_epochs, config.optimizer.decay_factors = (3,), (0.1,)
        config.buffer.policy = "class_balanced"  # class_random would keep nine tenths for classes that never come
    return config
