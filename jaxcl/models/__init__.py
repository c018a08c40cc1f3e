"""Networks, as pure functions: the only folder that imports Flax (Linen). One file a model.

A file NAME.py has `NAME`, a class of Linen modules or a function that gives one or a `Model`. It is called with keywords, of
which it names those that it uses:

    num_classes  K, outputs of the head
    dtype        of the computation; parameters, statistics and outputs are float32
    axis_name    mesh axis of the batch, or axes, over which a norm may sum its statistics
    classes      bool `[T, K]`, the classes of each task
    norm         a `Normalisation`, which the options `norm` and `norm_options` choose, see `_norms`

A field or parameter with a default is an option, see `_options`. Every model has one more: `batchformer`, heads of attention
across the rows of a batch in training, 0 for none, see `_batchformer`. A class of modules may have `rules` for its weights on a
mesh, see `jaxcl.partition`, and of what `Model` has `reads`, `remat`, `mixes` and `begin`. The module is called as
`module(images, train=..., mask=...)`, see `Apply`. The rest of jaxcl sees parameters, batch statistics and outputs, never a
module.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.check import check, one_of, refused
from jaxcl.mesh import Axis
from jaxcl.models import _batchformer
from jaxcl.models._dense import dense_inputs, dense_layers
from jaxcl.models._join import joining
from jaxcl.models._norms import NORMS, Normalisation, RowFacts, make_norm
from jaxcl.models._norms.base import PENALTIES, Mask, valid_of
from jaxcl.models._options import SIZE, WHOLE, bind
from jaxcl.models._parts import is_own, parts_named, scale_of_parts, with_still
from jaxcl.models._split import Halves, split
from jaxcl.models._towers import Towers, make_towers
from jaxcl.partition import Split
from jaxcl.registry import Registry
from jaxcl.types import PyTree

__all__ = [
    "MODELS",
    "NORMS",
    "PENALTIES",
    "Halves",
    "Model",
    "Normalisation",
    "RowFacts",
    "Towers",
    "dense_inputs",
    "dense_layers",
    "is_own",
    "joining",
    "make_model",
    "make_norm",
    "make_towers",
    "parts_named",
    "scale_of_parts",
    "split",
    "with_still",
]

NORM_OPTIONS: dict[str, Any] = {"norm": "local", "norm_options": {}}  # of every model that takes a norm
MODELS: Registry[Callable[..., Any]] = Registry("model.name", __name__)


class Init(Protocol):
    def __call__(self, key: jax.Array, image_shape: tuple[int, int, int]) -> dict[str, PyTree]:
        """{"params": ..., "batch_stats": ...} for images of shape (H, W, C), float32; no norm, no batch_stats: {}."""


class Apply(Protocol):
    def __call__(
        self, params: PyTree, batch_stats: PyTree, images: Any, *, train: bool, mask: Mask = None
    ) -> tuple[dict[str, jax.Array], PyTree]:
        """Forward pass; with `train` inside shard_map, where the norm sums over the devices.

        Args:
          params: as `Init` gives them.
          batch_stats: running statistics of the norm layers, {} without any.
          images: `[B, H, W, C]` floats; of a model of `joining` `jaxcl.latent.Rows`.
          train: static; normalise by the statistics of the batch and update the running ones.
          mask: `[B]` bool, False for invalid rows: their content, NaN included, touches no other row, no statistic and no
            gradient of a loss that gives them weight 0. None where all are valid. `RowFacts` where the model `reads` them.

        Returns:
          {"logits": [B, K] float32, "features": [B, D] float32, the input of the head} (see `dytox` for what it adds), or of
          a model that reconstructs images {"amplitude": ..., "phase": ...} of `[B, H, W, 1]` float32; and the new batch_stats:
          as given unless `train`. With the norms "local" and "ghost" they differ between devices; average them to keep them
          replicated. In training a layer may add "penalty", a term of the loss: float32 scalar, the same on every device, or
          `[B]`, whose mean over the valid rows of all devices is meant.
          With `batchformer`, training adds "batch_logits" `[B, K]`.
        """


class Model(NamedTuple):
    """A network as a pair of pure functions.

    Attributes:
      reads: whether `apply` reads `RowFacts` in training.
      fits, meets: see `Normalisation`.
      rules: by which its weights are divided over a mesh; () without any of its own.
      remat: whether its blocks are computed anew in the backward pass; what they leave is then named `partition.BLOCK`.
      mixes: the option by which rows meet in training elsewhere than in a batch norm; "" where they do not.
      begin: `(params, task) -> params` at the beginning of a task but the first, from those at the end of the one before; None:
        they stay. Arrays may have an axis of seeds before their own.
    """

    init: Init
    apply: Apply
    name: str
    reads: bool = False
    fits: Callable[[int], None] | None = None
    meets: Callable[[int, int], bool] | None = None
    rules: tuple[Split, ...] = ()
    remat: bool = False
    mixes: str = ""
    begin: Callable[[PyTree, jax.Array], PyTree] | None = None


def make_model(
    name: str,
    num_classes: int,
    *,
    options: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    axis_name: Axis | None = None,
    classes: np.ndarray | None = None,
) -> Model:
    """Builds a network.

    Args:
      name: one of `MODELS`, or `module.path:name`.
      num_classes, axis_name: see above.
      options: of the model; what is left out keeps its default.
      dtype: "float32" or "bfloat16".
      classes: for a model that grows with the tasks (dytox); None: one task.

    Raises:
      UserError: for an unknown name or option, or a value that is not allowed.
    """
    make = MODELS[name]
    check("num_classes", num_classes, SIZE)
    check("model.dtype", dtype, one_of(("float32", "bfloat16")))
    classes = np.ones((1, num_classes), bool) if classes is None else classes
    given = {"num_classes": num_classes, "dtype": jnp.dtype(dtype), "axis_name": axis_name, "classes": classes}
    options, norm = dict(options or {}), None
    if takes_norm(make):
        chosen = {key: options.pop(key, default) for key, default in NORM_OPTIONS.items()}
        where: Any = {"axis_name": axis_name, "dtype": jnp.dtype(dtype), "tasks": len(classes)}
        norm = make_norm(chosen["norm"], chosen["norm_options"], **where)
        given["norm"] = norm
    heads = options.pop("batchformer", 0)
    check(_batchformer.OPTION, heads, WHOLE)
    made = bind(name, make, options, given, more=NORM_OPTIONS if norm else ())
    if isinstance(made, Model):
        if heads:
            raise refused(_batchformer.OPTION, heads, f"0 to {name}, which is no module")
        return made
    init: Init = partial(_init, jax.jit(partial(made.init, train=False)))
    apply: Apply = partial(_apply, made)
    if heads:
        init, apply = _batchformer.make_batchformer(init, apply, heads, axis_name)
    fields = ("rules", "remat", "reads", "mixes", "begin")
    said: Any = {field: getattr(made, field) for field in fields if hasattr(made, field)}
    if norm:
        said |= {"reads": norm.reads, "fits": norm.fits, "meets": norm.meets}
    if heads:
        said["mixes"] = _batchformer.OPTION
    return Model(init, apply, name, **said)


def takes_norm(make: Callable[..., Any]) -> bool:
    """Whether a model is to be given a norm: it names one, and not as an option of its own."""
    parameter = inspect.signature(make).parameters.get("norm")
    return parameter is not None and parameter.default is parameter.empty


def _init(init: Callable[..., PyTree], key: jax.Array, image_shape: tuple[int, int, int]) -> dict[str, PyTree]:
    # `init` is compiled: the forward pass that only gives the shapes is then dead code.
    variables = init(key, jnp.zeros((1, *image_shape)))
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def _apply(
    module: nn.Module,
    params: PyTree,
    batch_stats: PyTree,
    images: jax.Array,
    *,
    train: bool,
    mask: Mask = None,
) -> tuple[dict[str, jax.Array], PyTree]:
    if mask is not None:  # weight 0 does not silence a NaN; a blank image does
        images = jnp.where(valid_of(mask)[:, None, None, None], images, 0)
    variables = {"params": params, "batch_stats": batch_stats}
    outputs, updates = module.apply(variables, images, train=train, mask=mask, mutable=["batch_stats", PENALTIES])
    if penalties := jax.tree.leaves(updates.get(PENALTIES, {})):
        outputs = outputs | {"penalty": sum(penalties)}
    return outputs, updates.get("batch_stats", {})
