"""A multi-layer perceptron with a norm before each activation, for streams of images whose pixels have no neighbours."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models._norms import Normalisation
from jaxcl.models._norms.base import Mask
from jaxcl.models._options import Sizes


class NormedMLP(nn.Module):
    """Dense + norm + ReLU layers and a linear head; features are the last hidden layer.

    Attributes:
      hidden: units of each hidden layer.
    """

    num_classes: int
    dtype: jnp.dtype
    norm: Normalisation
    hidden: Sizes = (100, 100)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: Mask = None) -> dict[str, jax.Array]:
        """images `[B, H, W, C]` floats, mask `[B]` -> logits `[B, K]`, features `[B, D]`."""
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype)
        x = images.reshape(len(images), -1).astype(self.dtype)
        for units in self.hidden:
            x = nn.relu(self.norm.layer()(dense(units)(x), train=train, mask=mask))
        features = x.astype(jnp.float32)
        return {"logits": nn.Dense(self.num_classes, name="head")(features), "features": features}


mlp_norm = NormedMLP
