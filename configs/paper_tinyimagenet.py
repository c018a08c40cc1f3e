"""The paper's experiment on a stand-in: Tiny-ImageNet at 32x32, 4 tasks of 50 classes, ResNet-18; see paper_imagenet.py.

    python -m experiments.paper --config=configs/paper_tinyimagenet.py --config.data.data_dir=TFDS_DIR --workdir=DIR

The protocol is that of 8 of the paper's devices, with the same global sizes (448 new rows, 56 replayed, 112 candidates) on any
number of devices; the stem is that for 32x32 images, and images are shifted by up to 4 pixels instead of cut.
`--config.buffer.share=0.1` gives the memory 10 % of the training rows instead of 30 %. Data: `tfds:tinyimagenet32`, a prepared
folder of 100,000 / 10,000 JPEG images at 32x32 (`data_dir`). The full size needs a GPU and has not been run yet.

`:cpu` is another, much smaller experiment, for 2 CPU cores: every tenth class (4 tasks of 5, 10,000 / 1,000 images), small
nets, 12 epochs a task. In proportion it keeps the protocol: c = b / 4, r = b / 8, a memory of 30 % by class, warm-up in the
first sixth of a task's epochs to 8 times the learning rate of one device, and its decay. Its accuracies are not the paper's.

    python -m experiments.studies.small_pack --from=tfds:tinyimagenet32 --from_dir=TFDS_DIR --train=500 --test=50 \
        --every=10 --out=FILE
    python -m experiments.paper --config=configs/paper_tinyimagenet.py:cpu --devices=8 --workdir=DIR \
        --config.data.source=npz:FILE

Figure 1 takes about 25 minutes on 2 quiet cores, with --seeds=3 (of the ResNet still one) 35; figure 2 about 20. Expected:
docs/paper.md.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxcl import shipped
from jaxcl.errors import UserError


def get_config(size: str = "gpu") -> ConfigDict:
    if size not in ("gpu", "cpu"):
        raise UserError(f"--config=configs/paper_tinyimagenet.py:{size}: no such size, choose gpu or cpu")
    config = shipped.load("paper_imagenet").protocol(devices=8)
    config.data.augment = ("crop", "flip")
    if size == "gpu":
        config.name = "Tiny-ImageNet 32x32, 4 x 50 classes"
        config.data.source = "tfds:tinyimagenet32"
        config.model.name = "resnet18"
        config.model.options = {"stem": "small", "norm": "local"}
    else:
        config.name = "Tiny-ImageNet 32x32, every tenth class, 4 x 5 classes (cpu size)"
        config.data.source = "npz:tinyimagenet_small.npz"
        config.data.threads = 1
        config.batch_size, config.buffer.representatives, config.buffer.candidates = 64, 8, 16
        config.epochs = 12
        config.model.name = "convnet"
        config.model.dtype = "float32"
        config.model.options = {"width": 16, "norm": "sync"}
        config.optimizer.learning_rate = 0.05
        config.optimizer.warmup_epochs = 2.0
        config.optimizer.decay_epochs = (8, 10, 11)
    return config


def get_figures(size: str = "gpu") -> dict[str, Any]:
    """What `experiments.paper` varies: fields of its `Figures`."""
    if size == "gpu":
        ghost = {"model.name": "ghostnet", "model.options": {"width": 1.0, "stem": "small", "norm": "local"}}
        resnet50 = {"model.name": "resnet50", "model.options": {"stem": "small", "norm": "local"}}
        return {"models": {"resnet18": {}, "resnet50": resnet50, "ghostnet": ghost}}
    narrow = {"model.name": "resnet18", "model.options": {"width": 8, "stem": "small", "norm": "sync"}}
    return {"models": {"convnet-16": {}, "resnet18-8": narrow}, "most_seeds": {"resnet18-8": 1}}
