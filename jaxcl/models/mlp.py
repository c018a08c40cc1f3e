"""A multi-layer perceptron on flattened images: the network of Split- and Permuted-MNIST (2 x 100 units)."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcl.models._options import Sizes

KERNEL_INITS = {"lecun": nn.initializers.lecun_normal(), "xavier": nn.initializers.xavier_uniform()}


class MLP(nn.Module):
    """Dense + ReLU layers and a linear head; features are the last hidden layer. Biases start at zero.

    Attributes:
      hidden: units of each hidden layer; () makes a linear model.
      kernel_init: "lecun" (normal) or "xavier" (uniform, as Mammoth's).
    """

    num_classes: int
    dtype: jnp.dtype
    hidden: Sizes = (100, 100)
    kernel_init: Literal["lecun", "xavier"] = "lecun"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: jax.Array | None = None) -> dict[str, jax.Array]:
        """images `[B, H, W, C]` floats -> logits `[B, K]`, features `[B, D]`. Rows do not mix: train and mask are unused."""
        del train, mask
        init = KERNEL_INITS[self.kernel_init]
        x = images.reshape(len(images), -1).astype(self.dtype)
        for units in self.hidden:
            x = nn.relu(nn.Dense(units, kernel_init=init, dtype=self.dtype)(x))
        features = x.astype(jnp.float32)
        return {"logits": nn.Dense(self.num_classes, kernel_init=init, name="head")(features), "features": features}


mlp = MLP
