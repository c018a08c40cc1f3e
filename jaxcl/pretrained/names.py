"""How the tensors of known PyTorch networks are called, beside the names of the same network here.

One function an architecture: it takes the path of a module here, "block_1.expand.Conv_0", and gives the name of the module
there, "_blocks.1._expand_conv". The tensors of a module go by its kind, see `LEAVES`.

    efficientnet_lite0     the package efficientnet-lite-pytorch, whose names are those of EfficientNet-PyTorch
    resnet18, resnet50     torchvision
    vit                    timm
"""

import math
import re
from collections.abc import Callable

import numpy as np

_OF_THREE = re.compile(r"\.attn\.(query|key|value)\.")
_TOKENS = ("params.cls_token", "params.pos_embed")
Names = Callable[[str], str]

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def efficientnet_lite0(module: str) -> str:
    if module == "head":
        return "_fc"
    place, _, layer = module.rpartition(".")
    norm = "Conv" not in layer
    if place in ("stem", "last"):
        return {"stem": ("_conv_stem", "_bn0"), "last": ("_conv_head", "_bn1")}[place][norm]
    if not (found := re.fullmatch(r"block_(\d+)\.(expand|depthwise|project)", place)):
        return module  # a neck, which the package's network has not
    number, part = found.groups()
    inside = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[part] if norm else f"_{part}_conv"
    return f"_blocks.{number}.{inside}"


def resnet(blocks: tuple[int, ...]) -> Names:
    """Of a torchvision ResNet with so many blocks in each stage."""
    places = [f"layer{stage + 1}.{i}" for stage, count in enumerate(blocks) for i in range(count)]

    def names(module: str) -> str:
        if module in ("stem", "stem_norm", "head"):
            return {"stem": "conv1", "stem_norm": "bn1", "head": "fc"}[module]
        number, layer = re.fullmatch(r"_Block_(\d+)\.(\w+)", module).groups()  # type: ignore[union-attr]
        if layer in ("shortcut", "shortcut_norm"):
            return f"{places[int(number)]}.downsample.{int(layer == 'shortcut_norm')}"
        kind, _, index = layer.rpartition("_")
        return f"{places[int(number)]}.{'conv' if kind.endswith('Conv') else 'bn'}{int(index) + 1}"

    return names


def vit(module: str) -> str:
    if not (found := re.fullmatch(r"block_(\d+)\.(?:(attn)\.)?(\w+)", module)):
        return {"patch_embed": "patch_embed.proj"}.get(module, module)
    number, attention, layer = found.groups()
    inside = f"attn.{'proj' if layer == 'out' else 'qkv'}" if attention else f"mlp.{layer}" if "fc" in layer else layer
    return f"blocks.{number}.{inside}"


NAMES: dict[str, Names] = {
    "efficientnet_lite0": efficientnet_lite0,
    "resnet18": resnet((2, 2, 2, 2)),
    "resnet50": resnet((3, 4, 6, 3)),
    "vit": vit,
}


def there(names: Names, path: str) -> str:
    """The name of a tensor there, for its path here, "params.stem.Conv_0.kernel"."""
    _, _, place = path.partition(".")
    module, _, leaf = place.rpartition(".")
    return f"{names(module)}.{LEAVES.get(leaf, leaf)}".removeprefix(".")


def here(path: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of PyTorch in the order of axes here: a kernel's inputs before its outputs, its window first. Of a transformer's
    the query, the key or the value of attention, which are one tensor there, with an axis of heads as in `shape`; and tokens
    without their axis of rows."""
    if found := _OF_THREE.search(path):
        thirds = np.split(tensor, 3) if len(tensor) % 3 == 0 else [tensor] * 3
        tensor = thirds[("query", "key", "value").index(found[1])]
    if path.endswith(".kernel") and tensor.ndim in (2, 4):
        tensor = np.transpose(tensor, (1, 0) if tensor.ndim == 2 else (2, 3, 1, 0))
    if path in _TOKENS and tensor.ndim == 3 and len(tensor) == 1:
        return tensor[0]
    return tensor.reshape(shape) if ".attn." in path and tensor.size == math.prod(shape) else tensor
