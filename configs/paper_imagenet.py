"""The experiment of Bouvier et al. (CCGrid 2024): ImageNet-1k, 4 tasks of 250 classes. MODEL-DEVICES, for example resnet50-16.

    python -m experiments.paper --config=configs/paper_imagenet.py:resnet50-16 --config.data.data_dir=TFDS_DIR --workdir=DIR

MODEL is resnet18, resnet50 or ghostnet. Each of DEVICES devices takes b = 56 new rows a step, offers c = 14 of them to the
memory and replays r = 7; 30 epochs a task. SGD with momentum 0.9 and weight decay 5e-5; in every task the learning rate
rises in 5 epochs to DEVICES times that of one device (at most 64 times), then falls to 0.5, 0.05 and 0.01 of it at epochs 21,
26 and 28. The memory holds 30 % of the training rows (`--config.buffer.share=`, in the paper also 0.05, 0.1 and 0.2).
Batch statistics are those of 56 new rows and their share of the replayed ones, as on one of the paper's devices, on any number
of them. Images are decoded and cut to 224x224 on the CPU, stored so, and mirrored on the device afresh at every replay.

Data: `tfds:imagenet2012`, prepared as array_record in TFDS_DIR. Reported by the paper for resnet50: top-5 accuracy 91 % from
scratch, 80.55 % with rehearsal (`top5_so_far` in result.json). Not run here.
"""

from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.training.config import default_config

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images in 0..1
LEARNING_RATES = {"resnet18": 0.0125, "resnet50": 0.0125, "ghostnet": 0.01}  # of one device


def protocol(devices: int, learning_rate: float = 0.0125) -> ConfigDict:
    """The paper's settings, but for data and model: sizes for so many devices, learning rate of one."""
    config = default_config()
    config.batch_size = 56 * devices
    config.epochs = 30
    config.data.tasks = 4
    config.data.augment = ("flip",)
    config.data.mean, config.data.std = MEAN, STD
    config.model.dtype = "bfloat16"
    scale = min(devices, 64)
    config.loss.prior = "balanced"  # the paper has none
    config.optimizer.learning_rate = learning_rate * scale
    config.optimizer.warmup_from = 1 / scale
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-5
    config.optimizer.schedule = "steps"
    config.optimizer.decay_epochs = (21, 26, 28)
    config.optimizer.decay_factors = (0.5, 0.05, 0.01)
    config.buffer.share = 0.3
    config.buffer.policy = "class_random"
    config.buffer.candidates = 14 * devices
    config.buffer.representatives = 7 * devices
    config.eval.batch_size = 64 * devices
    return config


def get_config(run: str = "resnet50-16") -> ConfigDict:
    model, _, devices = run.partition("-")
    if model not in LEARNING_RATES or not devices.isdecimal() or int(devices) < 1:
        raise UserError(
            f"--config=configs/paper_imagenet.py:{run}: allowed is MODEL-DEVICES with a model out of "
            f"{', '.join(LEARNING_RATES)}, for example resnet50-16"
        )
    config = protocol(int(devices), LEARNING_RATES[model])
    config.name = f"ImageNet-1k, 4 x 250 classes, {model}, {devices} devices"
    config.data.source = "tfds:imagenet2012"
    config.data.image_size = 224
    config.data.threads = 16
    config.model.name = model
    config.model.options = {"stem": "imagenet", "norm": "ghost", "norm_options": {"rows": 56}}
    return config
