"""Gradients of a whole batch from a few of its rows at a time, where the activations of all rows do not fit a device.

The outputs of all rows are found first, part after part, without what a backward pass needs. The loss is that of the whole
batch on them, whatever it is: a mean over the valid rows of all devices, one among the classes of the batch, a penalty on the
weights. Its gradient by the outputs then goes back through the model, part after part, in a forward and a backward pass. Gao et
al. 2021, Scaling deep contrastive learning batch size under memory limited setup.

The gradients are those of the whole batch but for the order of the sum, at the cost of one forward pass more. Rows must not mix
in the model, as they do in a batch norm.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.types import PyTree


def in_microbatches(
    count: int,
    forward: Callable[[PyTree, jax.Array, PyTree], tuple[PyTree, PyTree]],
    judge: Callable[[PyTree, PyTree], tuple[jax.Array, Any]],
    params: PyTree,
    images: jax.Array,
    mask: PyTree,
) -> tuple[jax.Array, Any, PyTree]:
    """The loss, what `judge` gives beside it, and the gradient.

    Args:
      count: of the parts; divides the rows `[B]`.
      forward: `(params, images, mask) -> (outputs, unused)` of some rows, leaves `[b, ...]`.
      judge: `(params, outputs) -> (loss, more)` of all rows.
      mask: of the model; what has no axis of rows is of every part.
    """

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(count, len(x) // count, *x.shape[1:]) if x.ndim else jnp.broadcast_to(x, count)

    parts = jax.tree.map(split, (images, mask))
    outputs = lax.map(lambda rows: forward(params, *rows)[0], parts)
    outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
    (loss, more), (grads, by_outputs) = jax.value_and_grad(judge, argnums=(0, 1), has_aux=True)(params, outputs)

    def add(grads: PyTree, rows: tuple[jax.Array, PyTree, PyTree]) -> tuple[PyTree, None]:
        images, mask, by_outputs = rows
        _, back = jax.vjp(lambda params: forward(params, images, mask)[0], params)
        return jax.tree.map(jnp.add, grads, back(by_outputs)[0]), None

    grads, _ = lax.scan(add, grads, (*parts, jax.tree.map(split, by_outputs)))
    return loss, more, grads
