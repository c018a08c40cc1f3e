"""PtychoNN on simulated ptychography: 4 tasks, each the scans of 2 new specimens; amplitude and phase from diffraction.

    python -m experiments.compare --config=configs/ptychography.py --workdir=DIR [--devices=8]
    python -m experiments.compare --config=configs/ptychography.py:cpu --workdir=DIR --devices=8

The generative case of Bouvier et al.: a record is three tensors (pattern, amplitude, phase), new instances of one kind of
data arrive, and the loss is the mean absolute error of amplitude and phase together. Labels are the specimens' numbers; they
divide the data into tasks and the memory into parts, and the network never sees them. `--config.data.scenario=instance`
instead brings new scans of all specimens in every task. Optimiser: Adam at a constant 5e-4, where the authors of PtychoNN let
the learning rate go up and down in cycles of several epochs. The data are simulated from a fixed seed, see
jaxcl/data/sources/ptychography.py.

`:cpu` has 32x32 patterns, a network of an eighth of the width and fewer epochs.
"""

from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.training.config import default_config


def get_config(size: str = "gpu") -> ConfigDict:
    if size not in ("gpu", "cpu"):
        raise UserError(f"--config=configs/ptychography.py:{size}: no such size, choose gpu or cpu")
    config = default_config()
    config.name = f"simulated ptychography, 4 x 2 specimens ({size} size)"
    config.batch_size = 64
    config.epochs = 30
    config.data.source = "ptychography:64"
    config.data.tasks = 4
    config.data.mean, config.data.std = (0.08,), (0.055,)  # of the patterns
    config.model.name = "ptychonn"
    config.model.options = {"width": 32}
    config.model.dtype = "bfloat16"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-4
    config.buffer.share = 0.1
    config.buffer.candidates = 16
    config.buffer.representatives = 16
    if size == "cpu":
        config.batch_size, config.buffer.candidates, config.buffer.representatives = 32, 8, 8
        config.epochs = 8
        config.data.source = "ptychography:32"
        config.data.threads = 1
        config.model.options = {"width": 4}
        config.model.dtype = "float32"
        config.optimizer.learning_rate = 2e-3
    return config
