"""The paper's experiment on a stand-in: Tiny-ImageNet at 32x32, 4 tasks of 50 classes, ResNet-18; see paper_imagenet.py.

    python -m experiments.paper --config=configs/paper_tinyimagenet.py --config.data.data_dir=TFDS_DIR --workdir=DIR

The protocol is that of 8 of the paper's devices, with the same global sizes (448 new rows, 56 replayed, 112 candidates) on any
number of devices, and batch statistics of groups as large as on one of them; the smaller sizes, which have been run, take those
of all devices together (`norm = "sync"`). The stem is that for 32x32 images, and images are shifted by up to 4 pixels instead
of cut.
`--config.buffer.share=0.1` gives the memory 10 % of the training rows instead of 30 %. Data: `tfds:tinyimagenet32`, a prepared
folder of 100,000 / 10,000 JPEG images at 32x32 (`data_dir`). The full size needs a GPU and has not been run yet.

Smaller ones, for CPU cores, keep the protocol in proportion: c = b / 4, r = b / 8, a memory of 30 % by class, warm-up in the
first sixth of a task's epochs to 8 times the learning rate of one device, and its decay. Their accuracies are not the paper's.

    :full     all 200 classes, 4 x 50, all rows, 30 epochs a task: hours for a seed of everything
    :medium   every other class, 4 x 25, 250 rows of each, 12 epochs a task; how long it takes is not measured yet
    :cpu      every tenth class, 4 x 5, 12 epochs a task, for the figures that need no accuracy: with five classes a task, top-5
              counts the task and not the class

    python -m experiments.studies.small_pack --from=tfds:tinyimagenet32 --from_dir=TFDS_DIR --train=250 --test=50 \
        --every=2 --out=FILE                                       # of :cpu --train=500 --every=10
    python -m experiments.studies.rehearsal --config=configs/paper_tinyimagenet.py:medium --devices=2 --workdir=DIR \
        --config.data.source=npz:FILE --json=FILE
    python -m experiments.paper --config=configs/paper_tinyimagenet.py:cpu --devices=8 --workdir=DIR \
        --config.data.source=npz:FILE

Expected: docs/paper.md.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxcl import shipped
from jaxcl.errors import UserError

GHOST = {"norm": "ghost", "norm_options": {"rows": 56}}  # what a device of the paper's normalises by


def get_config(size: str = "gpu") -> ConfigDict:
    if size not in ("gpu", "full", "medium", "cpu"):
        raise UserError(f"--config=configs/paper_tinyimagenet.py:{size}: no such size, choose gpu, full, medium or cpu")
    config = shipped.load("paper_imagenet").protocol(devices=8)
    config.data.augment = ("crop", "flip")
    config.name = "Tiny-ImageNet 32x32, 4 x 50 classes"
    config.data.source = "tfds:tinyimagenet32"
    if size == "gpu":
        config.model.name = "resnet18"
        config.model.options = {"stem": "small", **GHOST}
        return config
    config.data.threads = 1
    config.batch_size, config.buffer.representatives, config.buffer.candidates = 64, 8, 16
    config.model.name = "convnet"
    config.model.dtype = "float32"
    config.model.options = {"width": 16, "norm": "sync", "fold": 2}
    config.optimizer.learning_rate = 0.05
    if size == "full":
        return config
    config.epochs = 12
    config.optimizer.warmup_epochs = 2.0
    config.optimizer.decay_epochs = (8, 10, 11)
    if size == "medium":
        config.name = "Tiny-ImageNet 32x32, every other class, 4 x 25 classes of 250 rows (medium size)"
        config.data.source = "npz:tinyimagenet_medium.npz"
    else:
        config.name = "Tiny-ImageNet 32x32, every tenth class, 4 x 5 classes (cpu size)"
        config.data.source = "npz:tinyimagenet_small.npz"
        config.model.options = {"width": 16, "norm": "sync"}
    return config


def get_figures(size: str = "gpu") -> dict[str, Any]:
    """What `experiments.paper` varies: fields of its `Figures`."""
    if size == "gpu":
        ghost = {"model.name": "ghostnet", "model.options": {"width": 1.0, "stem": "small", **GHOST}}
        resnet50 = {"model.name": "resnet50", "model.options": {"stem": "small", **GHOST}}
        return {"models": {"resnet18": {}, "resnet50": resnet50, "ghostnet": ghost}}
    narrow = {"model.name": "resnet18", "model.options": {"width": 8, "stem": "small", "norm": "sync"}}
    return {"models": {"convnet-16": {}, "resnet18-8": narrow}, "most_seeds": {"resnet18-8": 1}}
