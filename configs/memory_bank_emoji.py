"""Emoji and their captions: 1,315 pairs to train on, 329 held out, two small towers.

    python -m experiments.studies.memory_bank --config=configs/memory_bank_emoji.py --config.data.source=emoji:FILE \
        --workdir=DIR

FILE: an archive of `noto` uint8 [n, 32, 32, 3], `caption`, and for `--config.data.pairs=styles` a second drawing, `emojitwo`
with `has_emojitwo`. A run takes some seconds on 2 cores; what to expect is said in docs/memory_bank.md.
"""

from ml_collections import ConfigDict

from jaxcl.contrastive.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.name = "emoji and captions"
    config.data.source = "emoji:emoji_pairs.npz"
    config.batch_size = 32
    config.epochs = 20
    config.momentum = 0.99  # 820 steps are too few for 0.999
    config.bank.start = 5.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.05
    return config
