"""Networks, as pure functions: the only folder that imports Flax (Linen).

`make_model` checks name and options and returns a `Model` of two functions over explicit pytrees; the rest of jaxcl
sees parameters, batch statistics and outputs, never a module.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.errors import UserError
from jaxcl.models.convnet import ConvNet
from jaxcl.models.convnext import ConvNeXt
from jaxcl.models.dytox import DyTox
from jaxcl.models.ghostnet import GhostNet
from jaxcl.models.mlp import KERNEL_INITS, MLP
from jaxcl.models.mobilenet import MobileNetV3Small
from jaxcl.models.norm import MaskedBatchNorm
from jaxcl.models.ptychonn import PtychoNN
from jaxcl.models.resnet import ResNet
from jaxcl.types import PyTree

__all__ = ["MaskedBatchNorm", "Model", "make_model"]


class Init(Protocol):
    def __call__(self, key: jax.Array, image_shape: tuple[int, int, int]) -> dict[str, PyTree]:
        """{"params": ..., "batch_stats": ...} for images of shape (H, W, C), float32; no norm, no batch_stats: {}."""


class Apply(Protocol):
    def __call__(
        self, params: PyTree, batch_stats: PyTree, images: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> tuple[dict[str, jax.Array], PyTree]:
        """Forward pass; inside shard_map where the norm is "sync" and `train` is True.

        Args:
          params: as `Init` gives them.
          batch_stats: running statistics of the norm layers, {} without any.
          images: [B, H, W, C] floats.
          train: static; normalise by the statistics of the batch and update the running ones.
          mask: [B] bool, False for invalid rows: their content, NaN included, touches no other row, no statistic and no
            gradient of a loss that gives them weight 0. None where all are valid.

        Returns:
          {"logits": [B, K] float32, "features": [B, D] float32, the input of the head} (see `DyTox` for what it adds), or of
          a model that reconstructs images {"amplitude": ..., "phase": ...} of [B, H, W, 1] float32; and the new batch_stats:
          as given unless `train`. With the "local" norm they differ between devices; average them to keep them replicated.
        """


class Model(NamedTuple):
    """A network as a pair of pure functions."""

    init: Init
    apply: Apply
    name: str


class _Option(NamedTuple):
    """An option's test, and what it allows in words."""

    ok: Callable[[Any], bool]
    allowed: str


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _one_of(*values: Any) -> _Option:
    return _Option(lambda v: type(v) in map(type, values) and v in values, " | ".join(map(repr, values)))


_WIDTH = _Option(_is_size, "a positive int")
_HIDDEN = _Option(lambda v: isinstance(v, list | tuple) and all(map(_is_size, v)), "a tuple of positive ints")
_NORM = _one_of("local", "sync")
_DTYPE = _one_of("float32", "bfloat16")
_STEM = _one_of("small", "imagenet")
_SCALE = _Option(lambda v: _is_size(v) or (isinstance(v, float) and 0 < v < float("inf")), "a positive number")
_RESNET = {"width": _WIDTH, "norm": _NORM, "stem": _STEM, "zero_init": _one_of(False, True)}
_DYTOX = {**dict.fromkeys(("width", "depth", "heads", "patch"), _WIDTH), "divergence": _one_of(False, True)}


def _ptychonn(num_classes: int, **fields: Any) -> nn.Module:
    del num_classes  # it reconstructs, whatever the rows' labels
    return PtychoNN(**fields)


_MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, _Option]]] = {
    "mlp": (MLP, {"hidden": _HIDDEN, "kernel_init": _one_of(*KERNEL_INITS)}),
    "convnet": (ConvNet, {"width": _WIDTH, "norm": _NORM}),
    "resnet18": (partial(ResNet, blocks=(2, 2, 2, 2)), _RESNET),
    "resnet50": (partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True), _RESNET),
    "ghostnet": (GhostNet, {"width": _SCALE, "norm": _NORM, "stem": _STEM}),
    "mobilenet_v3_small": (MobileNetV3Small, {"norm": _NORM, "stem": _STEM}),
    "convnext_tiny": (ConvNeXt, {"width": _WIDTH, "stem": _STEM}),
    "ptychonn": (_ptychonn, {"width": _WIDTH}),
    "dytox": (
        DyTox,
        {**dict.fromkeys(("width", "depth", "heads", "patch"), _WIDTH), "divergence": _one_of(False, True)},
    ),
}


def _check(field: str, value: Any, option: _Option) -> None:
    if not option.ok(value):
        raise UserError(f"{field}: {value!r} is not allowed; allowed: {option.allowed}")


def make_model(
    name: str,
    num_classes: int,
    *,
    options: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    axis_name: str | None = None,
    classes: np.ndarray | None = None,
) -> Model:
    """Builds a network.

    Args:
      name: "mlp", "convnet", "resnet18", "resnet50", "ghostnet", "mobilenet_v3_small", "convnext_tiny", "ptychonn" or
        "dytox".
      num_classes: K, outputs of the head.
      options: of the model; what is left out keeps its default.
        mlp: hidden = (100, 100), kernel_init = "lecun" | "xavier".
        convnet: width = 32, norm = "local" | "sync".
        resnet18, resnet50: width = 64, norm = "local" | "sync", stem = "small" | "imagenet", zero_init = False.
        ghostnet: width = 1.0 (a factor), norm = "local" | "sync", stem = "small" | "imagenet".
        mobilenet_v3_small: norm = "local" | "sync", stem = "small" | "imagenet".
        convnext_tiny: width = 96, stem = "small" | "imagenet".
        ptychonn: width = 32.
        dytox: width = 384, depth = 5, heads = 12, patch = 4, divergence = True.
      dtype: of the computation, "float32" or "bfloat16"; parameters, statistics and outputs are float32.
      axis_name: mesh axis of the batch; norm = "sync" sums its statistics over it, norm = "local" leaves it unused.
      classes: bool [T, K], the classes of each task, for a model that grows with the tasks (dytox); None: one task.

    Raises:
      UserError: for an unknown name or option, or a value that is not allowed.
    """
    if name not in _MODELS:
        raise UserError(f"model: unknown {name!r}; allowed: {', '.join(_MODELS)}")
    _check("num_classes", num_classes, _WIDTH)
    _check("dtype", dtype, _DTYPE)
    make, allowed = _MODELS[name]
    fields = dict(options or {})
    for key, value in fields.items():
        if key not in allowed:
            raise UserError(f"model options: {name} has no {key!r}; allowed: {', '.join(allowed)}")
        _check(f"model options: {name} {key}", value, allowed[key])
    if fields.pop("norm", "local") == "sync":
        fields["axis_name"] = axis_name
    if "hidden" in fields:
        fields["hidden"] = tuple(fields["hidden"])  # a module's fields must be hashable
    if name == "dytox":  # a class that several tasks have belongs to the first, one that none has to none
        table = np.ones((1, num_classes), bool) if classes is None else classes
        fields["task_of_class"] = tuple(np.where(table.any(axis=0), np.argmax(table, axis=0), -1).tolist())
    module = make(num_classes=num_classes, dtype=jnp.dtype(dtype), **fields)

    @jax.jit  # compiled, the forward pass that only gives the shapes is dead code
    def initialise(key: jax.Array, images: jax.Array) -> dict[str, PyTree]:
        variables = module.init(key, images, train=False)
        return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

    def init(key: jax.Array, image_shape: tuple[int, int, int]) -> dict[str, PyTree]:
        return initialise(key, jnp.zeros((1, *image_shape)))

    def apply(
        params: PyTree, batch_stats: PyTree, images: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> tuple[dict[str, jax.Array], PyTree]:
        if mask is not None:  # weight 0 does not silence a NaN; a blank image does
            images = jnp.where(mask[:, None, None, None], images, 0)
        variables = {"params": params, "batch_stats": batch_stats}
        outputs, updates = module.apply(variables, images, train=train, mask=mask, mutable=["batch_stats"])
        return outputs, updates["batch_stats"] if updates else {}

    return Model(init, apply, name)
