"""Which rows of a class are worth keeping, judged by their features at a task's end, on any number of devices.

    rank = rank_rows("icarl", key, features, rows.label, rows.valid, num_classes=K, quota=q, axis=AXIS)
    state = buffer.local.insert(state, in_rank_order(rows, rank, count), key)      # policy = "herding"

Every device ranks the rows it was given, towards class means over the rows of all devices, and keeps its share of the
quota; with one device, or with `herd` over a mesh axis on any number of them, this is iCaRL (Rebuffi et al., iCaRL:
Incremental Classifier and Representation Learning, CVPR 2017, algorithm 4). The policy `herding` keeps rows in the order in
which they come and shrinks classes from the end, so the best of each class survive (algorithm 5). Features are used as they
are: normalise them first, as iCaRL does.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.buffer.shard import Rows
from jaxcl.errors import UserError

SELECTIONS = ("random", "closest", "furthest", "icarl")
UNRANKED = np.iinfo(np.int32).max


def class_means(
    features: jax.Array, label: jax.Array, valid: jax.Array, num_classes: int, axis: str | None = None
) -> jax.Array:
    """Mean features of each class over the valid rows of all devices; zeros for a class without rows.

    Args:
      features: float `[n, D]`.
      label: int32 `[n]`.
      valid: bool `[n]`.
      num_classes: K.
      axis: mesh axis to sum over; None on one device.

    Returns:
      float32 `[K, D]`, the same on every device.
    """
    member = jax.nn.one_hot(label, num_classes, dtype=jnp.float32) * valid[:, None]
    total = jnp.einsum("nk,nd->kd", member, features.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    count = jnp.sum(member, axis=0)
    if axis is not None:
        total, count = lax.psum((total, count), axis)
    return total / jnp.maximum(count, 1.0)[:, None]


def rank_rows(
    selection: str,
    key: jax.Array,
    features: jax.Array,
    label: jax.Array,
    valid: jax.Array,
    *,
    num_classes: int,
    quota: jax.Array | int,
    axis: str | None = None,
) -> jax.Array:
    """Ranks this device's rows within their classes, best first.

    Args:
      selection: "icarl": greedily, each next row brings the mean of the chosen ones nearest to the class mean; "closest" and
        "furthest": by distance to the class mean; "random": a uniform permutation.
      key: of "random", for this device alone; the same key ranks the same rows alike.
      features, label, valid, num_classes, axis: see `class_means`.
      quota: rows wanted of each class on this device. "icarl" makes that many rounds over all rows, O(quota n D).

    Returns:
      int32 `[n]`: 0 for the best row of its class on this device; `UNRANKED` from the quota on and for invalid rows. Of equal
      rows the first is better.

    Raises:
      UserError: unknown selection.
    """
    if selection not in SELECTIONS:
        raise UserError(f"selection: {selection!r} is unknown, choose one of {', '.join(SELECTIONS)}")
    features = features.astype(jnp.float32)
    if selection == "random":
        return _rank_by(jax.random.bits(key, label.shape, jnp.uint32), label, valid, quota)
    means = class_means(features, label, valid, num_classes, axis)
    if selection == "icarl":
        return herd(means, features, label, valid, jnp.arange(len(label), dtype=jnp.int32), quota)
    distance = jnp.sum((features - means[label]) ** 2, axis=1)
    return _rank_by(distance if selection == "closest" else -distance, label, valid, quota)


def _rank_by(score: jax.Array, label: jax.Array, valid: jax.Array, quota: jax.Array | int) -> jax.Array:
    """Ranks by ascending score within each class."""
    position = jnp.arange(label.shape[0], dtype=jnp.int32)
    invalid, label, _, row = lax.sort((~valid, label, score, position), num_keys=3)
    begins = jnp.searchsorted(jnp.where(invalid, UNRANKED, label), label).astype(jnp.int32)
    rank = jnp.where(invalid | (position - begins >= quota), UNRANKED, position - begins)
    return jnp.zeros_like(position).at[row].set(rank, unique_indices=True)


def herd(
    means: jax.Array,
    features: jax.Array,
    label: jax.Array,
    valid: jax.Array,
    order: jax.Array,
    quota: jax.Array | int,
    axis: str | None = None,
) -> jax.Array:
    """iCaRL's algorithm 4 for all classes at once, over the rows of all devices: in round k each class chooses its row k.

    The choice is that of one device that holds all rows, wherever they lie: a round costs one pass over this device's rows
    and collectives of K scores and K rows of features.

    Args:
      means: float32 `[K, D]`, towards which the mean of the chosen rows is brought, see `class_means`.
      features: float32 `[n, D]`; label: int32 `[n]`; valid: bool `[n]`.
      order: int32 `[n]`, different for all rows of all devices; of equally good rows the least is chosen.
      quota: rows wanted of each class.
      axis: mesh axis along which devices choose together; None: this device alone.

    Returns:
      int32 `[n]`: 0 for the best row of its class; `UNRANKED` from the quota on and for invalid rows.
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


def in_rank_order(rows: Rows, rank: jax.Array, count: int) -> Rows:
    """This device's first `count` rows by rank, all classes in turn, ready to be inserted; rows without rank are invalid.

    An insert compares its rows pairwise, so give thousands in several parts: slices of this, in order.

    Args:
      rows: leaves `[n, ...]`.
      rank: int32 `[n]`, see `rank_rows`.
      count: at most n.
    """
    rank, chosen = lax.sort((rank, jnp.arange(rank.shape[0], dtype=jnp.int32)), num_keys=1)
    chosen = chosen[:count]
    rows = jax.tree.map(lambda x: x[chosen], rows)
    return Rows(rows.record, rows.label, rows.id, rows.valid & (rank[:count] != UNRANKED))
