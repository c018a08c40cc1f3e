"""A memory bank of embeddings, sharded over the devices: the buffer's shards and policy, its rows never leave their device.

Anchors travel, rows do not: every device scores the anchors of all devices against the rows it holds, and `loss.py` joins the
partial sums. Two kinds: "fifo", a queue of the last M embeddings (He et al., MoCo, CVPR 2020), and "slots", a slot for each
example of the data set, updated in place whenever the example is trained on (Wu et al., CVPR 2018).

Row s of the union lies on device s // (rows a device), whatever the number of devices: the bank as a global array is the same
on any of them, and so is a checkpoint. Writing comes before reading; the other order would copy the whole bank every step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import draw
from jaxcl.buffer import shard as shard_lib
from jaxcl.buffer.exchange.base import six_sigma
from jaxcl.buffer.policy import Policy, make_policy
from jaxcl.buffer.shard import Rows, Shard
from jaxcl.contrastive import storage as storage_lib
from jaxcl.mesh import AXIS, ROWS, WHOLE
from jaxcl.types import PyTree

SIDES = ("left", "right")  # of a pair, such as its image and its text
FAR = -1e30  # the score of what is no candidate: its share of a sum is exactly 0, and no gradient of it is NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BankState:
    """What a bank holds.

    Attributes:
      shard: record {side: stored embedding, "step": int32, when it was made}, label the key, id the example; split by rows.
      meta: of the policy; whole on every device.
    """

    shard: Shard
    meta: PyTree


def specs() -> BankState:
    """How the state lies on the mesh."""
    return BankState(ROWS, WHOLE)  # type: ignore[arg-type]


class Block(NamedTuple):
    """Some of the rows that this device holds.

    Attributes:
      record: as stored, leaves `[n, ...]`.
      key: int32 `[n]`.
      usable: bool `[n]`, whether the row is a candidate at all.
    """

    record: PyTree
    key: jax.Array
    usable: jax.Array


@dataclasses.dataclass(frozen=True)
class Bank:
    """Pure functions over a `BankState`; all but `init` for use inside `shard_map`. Make one with `make_bank`, which says what
    `capacity`, `dim`, `mesh`, `drawn`, `storage`, `sides` and `chunk` are.

    Attributes:
      here: rows that each device has memory for.
      policy: of "fifo", which slot of the union a row takes; None: its id.
    """

    capacity: int
    here: int
    dim: int
    mesh: Mesh
    drawn: int
    storage: str
    sides: tuple[str, ...]
    chunk: int
    policy: Policy | None

    @property
    def num_bytes(self) -> int:
        """Of the whole state, over all devices."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(self.init)))

    def init(self) -> BankState:
        """A state without a row, split over the mesh."""
        return mesh_lib.on_mesh(self.mesh, self._empty, (), specs())()

    def _empty(self) -> BankState:
        record = {side: storage_lib.spec(self.storage, self.dim) for side in self.sides}
        stored = shard_lib.empty(record | {"step": jax.ShapeDtypeStruct((), jnp.int32)}, self.here, ())
        return BankState(stored, self.policy.init(jnp.int32(0)) if self.policy else ())

    def pack(self, pair: Sequence[jax.Array], step: jax.Array) -> PyTree:
        """The record of embeddings float32 `[n, D]` of both sides, made at `step`."""
        both = zip(SIDES, pair, strict=True)
        kept = {side: storage_lib.encode(self.storage, x) for side, x in both if side in self.sides}
        return kept | {"step": jnp.full((len(pair[0]),), step, jnp.int32)}

    def insert(self, state: BankState, new: Rows) -> BankState:
        """Stores rows of all devices, the same on every device. In place when the state is donated."""
        slot, meta = jnp.where(new.valid, new.id, self.here * self.mesh.size), state.meta
        if self.policy:  # all devices see the same rows and make the same choice
            slot, meta = self.policy.choose(meta, jax.random.key(0), jnp.int32(0), new.label, new.valid)
        slot -= self._base()
        count = jnp.arange(len(slot), dtype=jnp.int32)
        mine = (slot >= 0) & (slot < self.here)
        return BankState(shard_lib.write(state.shard, new, jnp.where(mine, slot, self.here + count)), meta)

    def previous(self, state: BankState, ids: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """What this device stores of these examples, {side: float32 `[B, D]`}, and bool `[B]`: 0 and False where it holds
        nothing of them. Of "slots" alone."""
        slot = ids - self._base()
        stored, _, found = shard_lib.read(state.shard, jnp.clip(slot, 0, self.here - 1))
        mine = (slot >= 0) & (slot < self.here) & (found == ids) & (ids >= 0)
        return {side: jnp.where(mine[:, None], storage_lib.decode(stored[side]), 0) for side in self.sides}, mine

    def reader(self, state: BankState, key: jax.Array) -> tuple[Callable[[jax.Array], Block], jax.Array | int]:
        """`(read, blocks)`: `read(i)` is block i of this device's rows that serve as negatives, all of them or its share of a
        sample of the union; `blocks` is how many there are."""
        if not self.drawn:
            size = min(self.chunk, self.here)
            return functools.partial(self._chunk, size, state.shard), -(-self.here // size)
        devices = self.mesh.size
        held = jnp.clip(self.capacity - jnp.arange(devices, dtype=jnp.int32) * self.here, 0, self.here)
        plan = draw.make_plan(
            key, held, self.drawn, self.capacity
        )  # the same on all devices: ranks of the union, which are its slots
        me = lax.axis_index(AXIS)
        first, end = plan.first[me], plan.first[me + 1]
        # One block holds what a device has to supply, almost always; where it does not, there are more.
        size = min(self.drawn, self.here, self.chunk, six_sigma(self.drawn / devices, 1))
        return functools.partial(self._drawn_chunk, size, state.shard, plan.rank, first, end), -(-(end - first) // size)

    def _chunk(self, size: int, shard: Shard, i: jax.Array) -> Block:
        start = jnp.minimum(i * size, self.here - size)  # the last block reaches back into the one before
        number = start + jnp.arange(size, dtype=jnp.int32)
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), shard)
        return Block(part.record, part.label, (part.id >= 0) & (number >= i * size))

    def _drawn_chunk(
        self, size: int, shard: Shard, rank: jax.Array, first: jax.Array, end: jax.Array, i: jax.Array
    ) -> Block:
        position = first + i * size + jnp.arange(size, dtype=jnp.int32)
        slot = jnp.where(position < end, rank.at[position].get(mode="clip") - self._base(), 0)
        stored, key, ids = shard_lib.read(shard, slot)
        return Block(stored, key, (position < end) & (ids >= 0))

    def _base(self) -> jax.Array:
        """The number in the union of this device's first row."""
        return lax.axis_index(AXIS).astype(jnp.int32) * self.here


def make_bank(
    kind: str,
    *,
    capacity: int,
    dim: int,
    mesh: Mesh,
    drawn: int = 0,
    storage: str = "float32",
    sides: tuple[str, ...] = SIDES,
    chunk: int = 8192,
) -> Bank:
    """A bank; the config has been checked.

    Args:
      kind: "fifo" or "slots".
      capacity: of "fifo", rows of the union, a multiple of the devices; of "slots", examples of the data set: an id is a slot.
      dim: numbers of an embedding.
      mesh: the devices to spread it over.
      drawn: of "slots": how many rows of the union serve as negatives of a step, a simple random sample without replacement,
        new every time; 0: all.
      storage: one of `STORAGES`.
      sides: whose embeddings are kept.
      chunk: rows of a device that are scored at a time: what bounds the temporaries.
    """
    if kind == "fifo":
        rows, policy = capacity, make_policy("fifo", capacity=capacity, shards=1)
    else:  # any number of devices that divides 128 divides the rows alike, so that they may share a checkpoint
        least = math.lcm(128, mesh.size)
        rows, policy = -(-capacity // least) * least, None
    return Bank(capacity, rows // mesh.size, dim, mesh, drawn, storage, sides, chunk, policy)
