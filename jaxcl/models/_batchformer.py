"""BatchFormer: in training, a transformer layer lets the rows of a batch see each other before the head, which is shared.

Hou et al., CVPR 2022, BatchFormer: learning to explore sample relationships for robust representation learning. With the
features f of a batch, the layer T across its rows and the head h, the loss of a row is the mean of CE(h(f)) and CE(h(T(f))),
as in the authors' code, which classifies both halves as one batch; T is a post-norm encoder layer whose hidden layer is as
wide as the features. Evaluation leaves T out. Every row attends to the valid rows of all devices, whose keys and values are
gathered, so a step is the same on any number of them. The dropout of T is left out: a forward pass here takes no random
numbers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.check import refused
from jaxcl.mesh import Axis
from jaxcl.models._norms.base import Mask, valid_of
from jaxcl.types import PyTree

NAME = "batchformer"  # of its part of the parameters
OPTION = "model.options.batchformer"
LOGITS = "batch_logits"  # the output of training beside "logits"


class AcrossRows(nn.Module):
    """T.

    Attributes:
      heads: of attention; they divide the features.
      axis_name: mesh axis of the batch, or axes; None where this device has all of it.
    """

    heads: int
    axis_name: Axis | None = None

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """x `[n, D]`, valid bool `[n]` -> `[n, D]` float32."""
        each = x.shape[-1] // self.heads
        query, key, value = (nn.DenseGeneral((self.heads, each), name=name)(x) for name in ("query", "key", "value"))
        if self.axis_name is not None:
            key, value, valid = (lax.all_gather(found, self.axis_name, tiled=True) for found in (key, value, valid))
        likeness = jnp.einsum("nhd,mhd->hnm", query, key) / each**0.5
        share = jax.nn.softmax(jnp.where(valid, likeness, -1e30))
        seen = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(jnp.einsum("hnm,mhd->nhd", share, value))
        x = nn.LayerNorm(name="norm_1")(x + seen)
        hidden = nn.relu(nn.Dense(x.shape[-1], name="hidden")(x))
        return nn.LayerNorm(name="norm_2")(x + nn.Dense(x.shape[-1], name="last")(hidden))


def make_batchformer(init: Any, apply: Any, heads: int, axis_name: Axis | None) -> tuple[Any, Any]:
    """`init` and `apply` of a model with T beside it: further parameters, and in training the output "batch_logits" `[B, K]`.

    Raises (in `init`):
      UserError: the model has no linear head on its features, or the heads do not divide these.
    """
    across = AcrossRows(heads, axis_name)

    def with_layer(key: jax.Array, image_shape: tuple[int, int, int]) -> dict[str, PyTree]:
        variables = init(key, image_shape)
        head = variables["params"].get("head", {})
        if "kernel" not in head:
            raise refused(OPTION, heads, "0 to a model without a linear head")
        features = head["kernel"].shape[0]
        if features % heads:
            raise refused(OPTION, heads, f"a divisor of its {features} features")
        alone = AcrossRows(heads)  # an initialisation runs outside shard_map
        layer = alone.init(jax.random.fold_in(key, 1), jnp.zeros((1, features)), jnp.ones(1, bool))
        return variables | {"params": variables["params"] | {NAME: layer["params"]}}

    def applied(
        params: PyTree, batch_stats: PyTree, images: jax.Array, *, train: bool, mask: Mask = None
    ) -> tuple[dict[str, jax.Array], PyTree]:
        own = {name: x for name, x in params.items() if name != NAME}
        outputs, batch_stats = apply(own, batch_stats, images, train=train, mask=mask)
        if train:
            valid = jnp.ones(len(images), bool) if mask is None else valid_of(mask)
            seen = across.apply({"params": params[NAME]}, outputs["features"], valid)
            head = params["head"]
            outputs = outputs | {LOGITS: seen @ head["kernel"] + head.get("bias", 0.0)}
        return outputs, batch_stats

    return with_layer, applied
