"""A stored buffer on another number of devices: every row survives exactly once, and the shards are balanced again.

Done once, at the start of a continued run, with NumPy on the host. Which rows go where is the policy's `move`.
"""

from typing import Any

import jax
import numpy as np

from jaxcl.buffer import class_rows, weights
from jaxcl.buffer.policy import make_policy
from jaxcl.buffer.policy.base import INT32_MAX
from jaxcl.buffer.shard import Shard
from jaxcl.check import refused


def reshard(
    state: Shard, *, policy: str, capacity: int, num_classes: int, old: int, new: int, memory: str = "sharded"
) -> Shard:
    """The state of a buffer on `old` devices as one on `new` devices.

    Args:
      state: global NumPy arrays, leaves `[old * slots, ...]`, metadata `[old, ...]`. A record may be anything of each slot.
      policy, capacity, num_classes, memory: as given to `make_buffer`.

    Returns:
      Global NumPy arrays of a state that the same buffer on `new` devices might have.

    Raises:
      UserError: the memory is "independent", whose size is by definition another on another number of devices, or the policy
        cannot move.
    """
    if memory == "independent":
        raise refused("devices", new, f"{old}, as the run began: an independent memory grows with the devices")
    if memory == "replicated":
        return jax.tree.map(lambda x: np.concatenate([np.asarray(x)[: len(x) // old]] * new), state)
    # Whatever is accepted from now on, the rows stored so far go where they would.
    rule = make_policy(policy, capacity=capacity, shards=new, num_classes=num_classes, accept=1.0)
    if rule.move is None:
        raise refused("devices", new, f"{old}, as the run began: the policy {policy} cannot move to another number")
    moves = rule.move(state.meta, np.asarray(state.label), old)
    to = moves.shard * rule.slots + moves.slot

    def move(stored: Any, empty: int = 0) -> Any:
        out = np.full((new * rule.slots, *stored.shape[1:]), empty, stored.dtype)
        out[to] = np.asarray(stored)[moves.take]
        return out

    slot_of: Any = None
    if state.slot_of is not None:
        slot_of = np.zeros((new, len(state.slot_of) // old), np.int32)
        ids = np.asarray(state.id)[moves.take]
        there = ids >= 0  # not so where a row was removed
        slot_of[moves.shard[there], ids[there]] = moves.slot[there]
        slot_of = slot_of.reshape(-1)
    record = jax.tree.map(move, state.record)
    # No number that an id was made of is used again.
    came: Any = np.full((new,), -(-int(state.came.max()) * old // new), np.int32)
    lost: Any = np.zeros((new,), np.int32)
    lost[0] = min(int(np.sum(state.refused, dtype=np.int64)), INT32_MAX)
    tree = state.weights
    if tree is not None:
        tree = weights.build(move(tree.levels[0]).reshape(new, -1), float(np.max(tree.greatest)))
    label, ident, counts = move(state.label), move(state.id, empty=-1), state.class_rows
    if counts is not None:
        counts = class_rows.count(label, ident, new, counts.shape[1])
    return Shard(record, label, ident, moves.meta, came, lost, slot_of, tree, counts)
