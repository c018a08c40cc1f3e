"""How many rows of each class a shard holds, counted as they come and go, and how many of them a draw is expected to hold.

The counts cost two gathers and two scatters of an insert's rows, whatever the capacity.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.buffer.draw import expected_shares
from jaxcl.buffer.shard import Rows, Shard


def counted(state: Shard, rows: Rows, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The counts `[1, K]` of a shard into which these rows are about to be written, see `shard.write`; and `slot` as it was.

    The write has to use the `slot` that is returned: it waits for what is read here. Of a shard that might be read after it is
    written, XLA would keep a copy.
    """
    counts, slots = state.class_rows, len(state.id)
    classes, written = counts.shape[1], slot < slots
    ident, label = state.id.at[slot].get(mode="clip"), state.label.at[slot].get(mode="clip")
    gone = jnp.where(written & (ident >= 0) & (label >= 0), label, classes)  # beyond the classes: not counted
    slot = slot + jnp.minimum(gone, 0)
    come = jnp.where(written & (rows.label >= 0), rows.label, classes)
    return counts.at[0, come].add(1, mode="drop").at[0, gone].add(-1, mode="drop"), slot


def without(state: Shard, gone: jax.Array) -> jax.Array:
    """The counts `[1, K]` of a shard when the rows in these slots, bool `[slots]`, are removed."""
    classes = state.class_rows.shape[1]
    label = jnp.where(gone & (state.label >= 0), state.label, classes)
    return state.class_rows.at[0, label].add(-1, mode="drop")


def count(label: np.ndarray, ident: np.ndarray, shards: int, classes: int) -> np.ndarray:
    """The counts int32 `[shards, K]` of rows `[shards * slots]`."""
    known = (ident >= 0) & (label >= 0) & (label < classes)
    at = np.arange(len(label)) // (len(label) // shards) * classes + label
    return np.bincount(at[known], minlength=shards * classes).reshape(shards, classes).astype(np.int32)


def drawn_of(held: jax.Array, drawn: int, sampling: str) -> jax.Array:
    """Rows of each class that a draw of `drawn` rows is expected to hold: float32 `[K]`.

    Args:
      held: int32 `[K]`, rows of each class in the memory that is drawn from.
      sampling: "class_balanced", or another by which every row is equally likely.
    """
    if sampling == "class_balanced":
        return expected_shares(held, drawn)
    total: Any = jnp.sum(held)
    return jnp.minimum(drawn, total) * (held.astype(jnp.float32) / jnp.maximum(total, 1))
