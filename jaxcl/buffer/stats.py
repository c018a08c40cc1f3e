"""What a buffer says of itself: how many rows it holds, whether a draw would be full, and plain numbers for reports."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxcl.buffer.buffer import Sizes
from jaxcl.buffer.shard import Shard


def held_here(sizes: Sizes, state: Shard) -> jax.Array:
    """Rows that this device holds, int32 `[1]`; slots of removed rows are none, so all ids are counted."""
    return jnp.sum(state.id >= 0, dtype=jnp.int32)[None]


def size(sizes: Sizes, held: jax.Array) -> jax.Array:
    """Rows stored over all devices, copies included, int32 scalar; `held` int32 `[N]`."""
    return held[0] if sizes.memory == "replicated" else jnp.sum(held, dtype=jnp.int32)


def drawable_here(sizes: Sizes, state: Shard) -> jax.Array:
    """Rows that this device holds and may draw, int32 `[1]`: those of weight 0 are none."""
    return held_here(sizes, state) if state.weights is None else state.weights.positive


def can_draw(sizes: Sizes, held: jax.Array) -> jax.Array:
    """Whether there are as many rows as a draw asks for, bool scalar; `held` int32 `[N]`, see `drawable_here`."""
    if sizes.alone:
        return jnp.min(held) >= (1 if sizes.replaces else sizes.per_device)
    return size(sizes, held) >= (1 if sizes.replaces else sizes.representatives)


def stats(sizes: Sizes, state: Shard) -> dict[str, Any]:
    """Plain numbers about what the shards of all devices hold.

    Reads every slot's label and id on the host: for reports, not for every step. In a run of several processes all must call
    it.

    Returns:
      rows: stored rows over all devices, copies included; rows_per_shard; distinct_ids: different ids among them;
      overlap: of the rows of a shard, the share that a given other shard holds too, averaged over pairs of shards;
      refused: valid rows that could not be stored: a label outside [0, K) given to a policy that chooses by class, a negative
      id, or one beyond `num_ids`, a negative weight or one that is not finite; class_histogram: stored rows of each class in
      [0, K), where `num_classes` is known.
    """
    shards = sizes.shards
    ids, label, refused = (
        np.asarray(multihost_utils.process_allgather(x, tiled=True)) for x in (state.id, state.label, state.refused)
    )
    written = ids >= 0
    held = [np.unique(row[row >= 0]) for row in ids.reshape(shards, -1)]
    every = np.concatenate(held)
    # An id held by c shards makes c (c - 1) of the ordered pairs (row of a shard, other shard that holds it too).
    copies = np.unique(every, return_counts=True)[1].astype(np.int64)
    pairs = len(every) * (shards - 1)
    found = {
        "rows": int(written.sum()),
        "rows_per_shard": written.reshape(shards, -1).sum(axis=1).tolist(),
        "distinct_ids": len(copies),
        "overlap": float((copies * (copies - 1)).sum() / pairs) if pairs else 0.0,
        "refused": int(refused.sum() if sizes.memory == "sharded" else refused[0]),
    }
    if sizes.num_classes is not None:
        known = label[written & (label >= 0) & (label < sizes.num_classes)]
        found["class_histogram"] = np.bincount(known, minlength=sizes.num_classes).tolist()
    return found
