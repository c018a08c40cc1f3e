"""Which rows of a class are worth keeping, judged by their features at a task's end, on any number of devices.

    rank = rank_rows("icarl", key, features, label, valid, id, num_classes=K, quota=q, axis=AXIS)
    state = buffer.local.keep(state, rows_of_this_device, key)      # best first; policy = "herding"

A choice is one over the rows of all devices: the same rows are chosen on any number of them. How many choices are made, and
who stores what, is the memory's mode, see `jaxcl.training.exemplars`. The policy `herding` keeps rows in the order in which
they come and shrinks classes from the end, so the best of each class survive (Rebuffi et al., iCaRL: Incremental Classifier
and Representation Learning, CVPR 2017, algorithms 4 and 5). The other selections are those of DyTox (Douillard et al., CVPR
2022): by distance to the class mean, and at random, here without replacement.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.check import check, one_of
from jaxcl.mesh import Axis
from jaxcl.nearest_mean import class_sums, unit

SELECTIONS = ("random", "closest", "furthest", "icarl")
FEATURES = ("clean", "augmented")  # of what images
KEYS = ("shared", "per_shard")  # of several choices
QUOTAS = ("adaptive", "fixed")  # rows of a class
UNRANKED = np.iinfo(np.int32).max


def class_means(
    features: jax.Array, label: jax.Array, valid: jax.Array, num_classes: int, axis: Axis | None = None
) -> jax.Array:
    """Mean features of each class over the valid rows of all devices; zeros for a class without rows.

    Arguments as of `rank_rows`; float32 `[K, D]`, the same on every device.
    """
    total, count = class_sums(features, label, valid, num_classes)
    if axis is not None:
        total, count = lax.psum((total, count), axis)
    return total / jnp.maximum(count, 1.0)[:, None]


def rank_rows(
    selection: str,
    key: jax.Array,
    features: jax.Array,
    label: jax.Array,
    valid: jax.Array,
    order: jax.Array,
    *,
    num_classes: int,
    quota: jax.Array | int,
    axis: Axis | None = None,
) -> jax.Array:
    """Ranks the rows of all devices within their classes, best first.

    Args:
      selection: "icarl": greedily, each next row brings the mean of the chosen ones nearest to the class mean, of features
        scaled to length 1; "closest" and "furthest": by distance to the class mean; "random": a uniform permutation.
      key: of "random", the same on all devices; the same key ranks the same rows alike.
      features: float `[n, D]`, not read by "random"; label: int32 `[n]`; valid: bool `[n]`.
      order: int32 `[n]`, different for all rows of all devices: an id. Of equally good rows the least is better.
      num_classes: K.
      quota: rows wanted of each class. "icarl" makes that many rounds over all rows, O(quota n D).
      axis: mesh axis along which devices choose together; None: one device.

    Returns:
      int32 `[n]`: 0 for the best row of its class; `UNRANKED` from the quota on and for invalid rows.

    Raises:
      UserError: unknown selection.
    """
    check("selection", selection, one_of(SELECTIONS))
    if selection == "random":
        bits = jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row), (), jnp.uint32))(order)
        return _rank_by(bits, label, valid, order, quota, axis)
    features = features.astype(jnp.float32)
    if selection == "icarl":
        features = unit(features)
    means = class_means(features, label, valid, num_classes, axis)
    if selection == "icarl":
        return herd(means, features, label, valid, order, quota, axis)
    distance = jnp.sum((features - means[label]) ** 2, axis=1)
    return _rank_by(distance if selection == "closest" else -distance, label, valid, order, quota, axis)


def _rank_by(
    score: jax.Array, label: jax.Array, valid: jax.Array, order: jax.Array, quota: jax.Array | int, axis: Axis | None
) -> jax.Array:
    """Ranks by ascending score within each class; every device sorts the scores of all and keeps those of its own rows."""
    n, rows = label.shape[0], (~valid, label, score, order)
    if axis is not None:
        rows = lax.all_gather(rows, axis, tiled=True)
    position = jnp.arange(rows[0].shape[0], dtype=jnp.int32)
    invalid, label, _, _, row = lax.sort((*rows, position), num_keys=4)
    begins = jnp.searchsorted(jnp.where(invalid, UNRANKED, label), label).astype(jnp.int32)
    rank = jnp.where(invalid | (position - begins >= quota), UNRANKED, position - begins)
    rank = jnp.zeros_like(position).at[row].set(rank, unique_indices=True)
    return rank if axis is None else lax.dynamic_slice(rank, (lax.axis_index(axis) * n,), (n,))


def herd(
    means: jax.Array,
    features: jax.Array,
    label: jax.Array,
    valid: jax.Array,
    order: jax.Array,
    quota: jax.Array | int,
    axis: Axis | None = None,
) -> jax.Array:
    """iCaRL's algorithm 4 for all classes at once, over the rows of all devices: in round k each class chooses its row k.

    The choice is that of one device that holds all rows, wherever they lie: a round costs one pass over this device's rows
    and collectives of K scores and K rows of features.

    `means`: float32 `[K, D]`, towards which the mean of the chosen rows is brought, see `class_means`. The other arguments and
    the result are those of `rank_rows`.
    """
    num_classes = means.shape[0]

    def least(values: jax.Array) -> jax.Array:
        """The least of each class, `[K]`."""
        found = jax.ops.segment_min(values, label, num_classes)
        return found if axis is None else lax.pmin(found, axis)

    def choose(k, carry):
        rank, total = carry
        mean = (total[label] + features) / (k + 1)
        distance = jnp.where(valid & (rank == UNRANKED), jnp.sum((means[label] - mean) ** 2, axis=1), jnp.inf)
        nearest = (distance == least(distance)[label]) & (distance < jnp.inf)
        chosen = nearest & (order == least(jnp.where(nearest, order, UNRANKED))[label])
        added = jax.ops.segment_sum(jnp.where(chosen[:, None], features, 0.0), label, num_classes)
        return jnp.where(chosen, k, rank), total + (added if axis is None else lax.psum(added, axis))

    start = jnp.full(label.shape, UNRANKED, jnp.int32), jnp.zeros_like(means)
    return lax.fori_loop(0, quota, choose, start)[0]
