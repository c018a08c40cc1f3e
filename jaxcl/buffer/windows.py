"""Windows of a stream: the rows that follow a drawn one, as a ring of the policy `fifo` keeps them.

A stream's rows follow one another in a ring if one device gives them all, in their order and without those of other streams
in between. Where its rows do not follow, a window ends.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.buffer.bits import Spec, leaf_name
from jaxcl.buffer.shard import Shard
from jaxcl.check import refused
from jaxcl.types import PyTree


class Window(NamedTuple):
    """What a draw gives in place of one row.

    Attributes:
      length: L, rows of a window.
      time: number of the record's leaf that counts the steps of the stream.
    """

    length: int
    time: int


def make_window(record: PyTree, length: int, time: str | None) -> Window:
    """A window of `length` rows of this record, a pytree of `jax.ShapeDtypeStruct`; `time` names a leaf of it.

    Raises:
      UserError: there is no such leaf, or it is no integer scalar.
    """
    leaves: list[tuple[Any, Spec]] = jax.tree_util.tree_leaves_with_path(record)
    counts = {
        leaf_name("", path).removeprefix("."): i
        for i, (path, leaf) in enumerate(leaves)
        if leaf.shape == () and jnp.issubdtype(leaf.dtype, jnp.integer)
    }
    if time not in counts:
        raise refused(
            "buffer.time",
            time,
            f"the integer scalar of the record that counts steps, {' or '.join(counts) or 'which is missing'}",
        )
    return Window(length, counts[time])


def read(window: Window, shard: Shard, slot: jax.Array, room: jax.Array) -> tuple[PyTree, jax.Array]:
    """The windows that begin at stored rows, without gradient.

    Args:
      window: what is wanted.
      shard: one of the policy `fifo`.
      slot: int32 `[n]`.
      room: int32 scalar, rows of the ring.

    Returns:
      The record `[n, L, ...]`, zero behind the end of a window, and how many rows of it follow one another, int32 `[n]`: until
      the ring's newest row, or one whose time is not one more than that of the row before.
    """
    record = lax.stop_gradient(shard.record)
    step = jnp.arange(window.length, dtype=jnp.int32)
    behind = (shard.meta["next"][0] - 1 - slot) % room  # how many rows came later
    places = (slot[:, None] + step) % room
    time = jax.tree.leaves(record)[window.time].at[places].get(mode="clip")
    follows = (time == time[:, :1] + step.astype(time.dtype)) & (step <= behind[:, None])
    follows &= shard.id.at[places].get(mode="clip") >= 0  # not so where a row was removed
    inside = jnp.cumsum(~follows, axis=1) == 0

    def rows(leaf: jax.Array) -> jax.Array:
        found = leaf.at[places].get(mode="clip")
        return jnp.where(inside.reshape(*inside.shape, *[1] * (found.ndim - 2)), found, jnp.zeros((), leaf.dtype))

    return jax.tree.map(rows, record), jnp.sum(inside, axis=1, dtype=jnp.int32)
