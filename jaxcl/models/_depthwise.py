"""Depthwise convolutions as sums of shifted images, for CPUs.

XLA's depthwise convolution takes a general loop on a CPU; a multiplication and an addition for each place of the window are
fused, and vectorised over the channels. Elsewhere the convolution of the library is used. The two differ by rounding alone.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def depthwise(images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **more: Any) -> jax.Array:
    """As `lax.conv_general_dilated` is called by `nn.Conv`, for a convolution of each channel alone, not dilated.

    images `[B, H, W, C]`, kernel `[k, k, 1, C]` -> `[B, H / stride, W / stride, C]`.
    """
    if jax.default_backend() != "cpu":
        return lax.conv_general_dilated(images, kernel, strides, padding, **more)
    window = kernel.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], window, strides, padding)
    padded = lax.pad(images, images.dtype.type(0), ((0, 0, 0), *((*pad, 0) for pad in padding), (0, 0, 0)))
    sizes = [(n - k) // s + 1 for n, k, s in zip(padded.shape[1:3], window, strides, strict=True)]
    shifted = []
    for i, j in np.ndindex(*window):
        ends = [at + (n - 1) * s + 1 for at, n, s in zip((i, j), sizes, strides, strict=True)]
        shifted.append(padded[:, i : ends[0] : strides[0], j : ends[1] : strides[1], :] * kernel[i, j, 0])
    return functools.reduce(jnp.add, shifted)
