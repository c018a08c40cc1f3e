"""Weight standardisation: a convolution by (W - mean) / std, over each filter's inputs. Qiao et al. 2019, Micro-batch training
with batch-channel normalization and weight standardization, section 3. As in the authors' code, the deviation has n - 1 in its
denominator and 1e-5 added."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-5


class StandardisedConv(nn.Conv):
    """`nn.Conv`, of which the parameter `kernel` is standardised wherever it is read."""

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        value = super().param(name, *args, **kwargs)
        return standardised(value) if name == "kernel" else value


def standardised(kernel: jax.Array) -> jax.Array:
    """kernel `[..., inputs, filters]` with mean 0 and deviation 1 over all but the last axis."""
    axes = tuple(range(kernel.ndim - 1))
    centred = kernel - kernel.mean(axes)
    inputs = kernel.size // kernel.shape[-1]
    deviation = jnp.sqrt(jnp.sum(jnp.square(centred), axes) / max(inputs - 1, 1) + 1e-12)  # its gradient at 0 is finite
    return centred / (deviation + EPSILON)
