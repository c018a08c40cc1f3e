"""The classifier of the nearest class mean, of features scaled to length 1.

Rebuffi et al. 2017, iCaRL, algorithm 1: the mean of a class is that of the unit vectors of its rows, itself scaled to length 1,
and a row belongs to the class whose mean has the least Euclidean distance to the row's own unit vector.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Means(NamedTuple):
    """Of each class.

    Attributes:
      mean: float32 `[K, D]`, of length 1; zeros where there is none.
      known: bool `[K]`, whether the class has rows.
    """

    mean: jax.Array
    known: jax.Array


def unit(vectors: jax.Array) -> jax.Array:
    """`[n, D]` scaled to length 1; a zero vector stays zero."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def class_sums(
    features: jax.Array, label: jax.Array, valid: jax.Array, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """Sums over the valid rows of each class: of the features `[n, D]`, float32 `[K, D]`, and their number, `[K]`."""
    member = jax.nn.one_hot(label, num_classes, dtype=jnp.float32) * valid[:, None]
    total = jnp.einsum("nk,nd->kd", member, features.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return total, jnp.sum(member, axis=0)


def means_of(sums: jax.Array, count: jax.Array) -> Means:
    """From what `class_sums` gives for unit vectors, added up over all rows."""
    return Means(unit(sums), count > 0)


def nearness(means: Means, features: jax.Array) -> jax.Array:
    """By which classes are ranked, the nearest mean first: float32 `[n, K]` for features `[n, D]`; -2 for one without rows.

    Of unit vectors, the nearest is the one of the largest inner product.
    """
    return jnp.where(means.known, unit(features) @ means.mean.T, -2.0)
