"""DyTox on CIFAR-100, 10 tasks of 10 classes: the settings of the paper and its program, as far as they exist here.

    python -m experiments.train --config=configs/dytox_cifar100.py --config.data.data_dir=TFDS_DIR --workdir=DIR

Douillard et al., CVPR 2022; options `cifar_dytox`, `cifar100_10-10` and `cifar100_order1` of the authors' program on 2 GPUs:
500 epochs a task, batches of 128 a GPU, AdamW at 5e-4 * 256 / 512 with 5 epochs of warm-up and a cosine, weight decay 1e-6;
from the second task on the memory joins the task's data; 20 epochs of balanced fine-tuning, the encoder frozen, at
5e-5 * 256 / 512, rows class by class. The memory is 2,000 rows, 20 a class, as one; on 2 devices the erratum's two others are

    one memory each, 1,000 rows (its "distributed memory"):  --config.buffer.memory=independent --config.buffer.capacity=1000
        --config.buffer.replay=append_part
    as first published, 2,000 rows each:  the same with --config.buffer.capacity=2000

and `--config.strategies.dytox.mixup=0.8` is DyTox+. Published, average / last accuracy: 67.33 / 51.68, 71.50 / 57.76 and
73.66 / 60.67. Not run yet: it needs a GPU and CIFAR-100 as a prepared TFDS folder.

Not as there: augmentation is crop and flip (there also RandAugment, and every image three times in a row of batches); no
stochastic depth; the learning rate falls to 0 instead of 1e-5.
"""

from ml_collections import ConfigDict

from jaxcl.training.config import default_config

# The order of classes of Yan et al. (DER, CVPR 2021), their seed 1993, which all baselines of the paper share.
ORDER = (
    *(87, 0, 52, 58, 44, 91, 68, 97, 51, 15),
    *(94, 92, 10, 72, 49, 78, 61, 14, 8, 86),
    *(84, 96, 18, 24, 32, 45, 88, 11, 4, 67),
    *(69, 66, 77, 47, 79, 93, 29, 50, 57, 83),
    *(17, 81, 41, 12, 37, 59, 25, 20, 80, 73),
    *(1, 28, 6, 46, 62, 82, 53, 9, 31, 75),
    *(38, 63, 33, 74, 27, 22, 36, 3, 16, 21),
    *(60, 19, 70, 90, 89, 43, 5, 42, 65, 76),
    *(40, 30, 23, 85, 2, 95, 56, 48, 71, 64),
    *(98, 13, 99, 7, 34, 55, 54, 26, 35, 39),
)


def get_config() -> ConfigDict:
    config = default_config()
    config.name = "DyTox, CIFAR-100, 10 x 10 classes"
    config.strategy = "dytox"
    config.batch_size = 256
    config.epochs = 500
    config.data.source = "tfds:cifar100"
    with config.ignore_type():  # a list of classes where the default is a number of tasks
        config.data.tasks = tuple(ORDER[begin : begin + 10] for begin in range(0, 100, 10))
    config.data.loss_classes = "seen"  # of the accuracy in the log; the loss has its own
    config.data.augment = ("crop", "flip")
    config.data.mean = (0.5071, 0.4867, 0.4408)
    config.data.std = (0.2675, 0.2565, 0.2761)
    config.model.name = "dytox"
    config.model.options = {"width": 384, "depth": 5, "heads": 12, "patch": 4}
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2.5e-4
    config.optimizer.weight_decay = 1e-6
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.warmup_from = 0.002
    config.buffer.capacity = 2000
    config.buffer.replay = "append"
    config.buffer.selection.by = "icarl"
    config.buffer.selection.features = "augmented"
    config.buffer.selection.random_keys = "per_shard"
    config.finetune.epochs = 20
    config.finetune.learning_rate = 2.5e-5
    config.finetune.frozen = ("patch_embed", "pos_embed", *(f"block_{number}" for number in range(5)))
    config.finetune.order = "sequential"
    return config
