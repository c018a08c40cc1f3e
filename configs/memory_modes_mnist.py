"""Split-MNIST with a memory that DyTox's erratum is about: exemplars chosen at a task's end, appended, a balanced fine-tuning.

    python -m experiments.studies.memory_modes --config=configs/memory_modes_mnist.py --workdir=DIR --devices=8 \\
        --config.data.data_dir=TFDS_DIR --json=experiments/results/memory_modes.json

5 tasks of 2 classes, one pass over each, an MLP of 2 x 64 units; images are shifted by up to 3 pixels, in training and for
the features by which exemplars are chosen. 160 rows of memory: 16 a class at the end, 2 a class on each of 8 devices. The
experiment varies memory, selection, replay and fine-tuning, see there; docs/memory_modes.md says what it found. Under 20
minutes on 2 cores.

Data: `tfds:mnist`, prepared in TFDS's default folder or in `--config.data.data_dir`, or `--config.data.source=npz:FILE`.
"""

from ml_collections import ConfigDict

from jaxcl.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.name = "Memory modes, Split-MNIST, 5 x 2 classes"
    config.strategy = "er"
    config.batch_size = 128
    config.epochs = 1
    config.data.source = "tfds:mnist"
    config.data.tasks = 5
    config.data.augment = ("crop",)
    config.data.threads = 1
    config.eval.batch_size = 1000
    config.model.name = "mlp"
    config.model.options = {"hidden": (64, 64)}
    config.optimizer.learning_rate = 0.1
    config.buffer.capacity = 160
    config.buffer.representatives = 128
    config.buffer.selection.by = "icarl"
    config.buffer.selection.features = "augmented"
    config.buffer.selection.random_keys = "per_shard"
    config.buffer.replay = "append"
    config.finetune.epochs = 20
    config.finetune.learning_rate = 0.1
    config.finetune.frozen = ("Dense_0", "Dense_1")
    return config
