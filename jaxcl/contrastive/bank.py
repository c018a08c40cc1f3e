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


@dataclasses.dataclass(frozen=True)
class Block:
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
    """Pure functions bound to their sizes; all but `init` for use inside `shard_map`. Make one with `make_bank`.

    Attributes:
      init: `() -> state`, without a row, split over the mesh.
      insert: `(state, rows) -> state`; `rows` are those of all devices, the same on every device. In place when donated.
      reader: `(state, key) -> (read, blocks)`: `read(i)` is block i of this device's rows that serve as negatives, all of
        them or its share of a sample of the union; `blocks` how many there are.
      previous: `(state, ids) -> ({side: float32 [B, D]}, bool [B])`: what is stored of these examples on this device, 0 and
        False where it holds nothing of them. Of "slots" alone.
      pack: `(pair, step) -> record` of embeddings float32 `[n, D]` of both sides, made at `step`.
      capacity: rows of the union.
      dim: numbers of an embedding.
      drawn: negatives a step, over all devices.
      sides: those that are stored.
      num_bytes: of the whole state, over all devices.
    """

    init: Callable[[], BankState]
    insert: Callable[[BankState, Rows], BankState]
    reader: Callable[[BankState, jax.Array], tuple[Callable[[jax.Array], Block], jax.Array | int]]
    previous: Callable[[BankState, jax.Array], tuple[dict[str, jax.Array], jax.Array]]
    pack: Callable[[Sequence[jax.Array], jax.Array], PyTree]
    capacity: int
    dim: int
    drawn: int
    sides: tuple[str, ...]
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static of a bank; see `make_bank`.

    Attributes:
      capacity: rows of the union.
      here: rows that each device has memory for.
      devices: N.
      dim, drawn, storage, sides, chunk: as given to `make_bank`.
      policy: of "fifo", which slot of the union a row takes; None: its id.
    """

    capacity: int
    here: int
    devices: int
    dim: int
    drawn: int
    storage: str
    sides: tuple[str, ...]
    chunk: int
    policy: Policy | None

    def base(self) -> jax.Array:
        """The number in the union of this device's first row."""
        return lax.axis_index(AXIS).astype(jnp.int32) * self.here


def specs() -> BankState:
    """How the state lies on the mesh."""
    return BankState(ROWS, WHOLE)  # type: ignore[arg-type]


def init(sizes: Sizes) -> BankState:
    record = {side: storage_lib.spec(sizes.storage, sizes.dim) for side in sizes.sides}
    stored = shard_lib.empty(record | {"step": jax.ShapeDtypeStruct((), jnp.int32)}, sizes.here, ())
    return BankState(stored, sizes.policy.init(jnp.int32(0)) if sizes.policy else ())


def insert(sizes: Sizes, state: BankState, new: Rows) -> BankState:
    here, meta = sizes.here, state.meta
    slot = jnp.where(new.valid, new.id, here * sizes.devices)
    if sizes.policy:  # all devices see the same rows and make the same choice
        slot, meta = sizes.policy.choose(meta, jax.random.key(0), jnp.int32(0), new.label, new.valid)
    slot -= sizes.base()
    count = jnp.arange(len(slot), dtype=jnp.int32)
    mine = (slot >= 0) & (slot < here)
    return BankState(shard_lib.write(state.shard, new, jnp.where(mine, slot, here + count), ()), meta)


def read_all(sizes: Sizes, state: BankState, key: jax.Array) -> tuple[Callable[[jax.Array], Block], int]:
    """The reader of all rows of this device."""
    size = min(sizes.chunk, sizes.here)
    return functools.partial(_chunk, sizes.here, size, state.shard), -(-sizes.here // size)


def _chunk(here: int, size: int, shard: Shard, i: jax.Array) -> Block:
    start = jnp.minimum(i * size, here - size)  # the last block reaches back into the one before
    number = start + jnp.arange(size, dtype=jnp.int32)
    part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), shard)
    return Block(part.record, part.label, (part.id >= 0) & (number >= i * size))


def read_drawn(sizes: Sizes, state: BankState, key: jax.Array) -> tuple[Callable[[jax.Array], Block], jax.Array]:
    """The reader of this device's rows in a sample of the union."""
    held = jnp.clip(sizes.capacity - jnp.arange(sizes.devices, dtype=jnp.int32) * sizes.here, 0, sizes.here)
    plan = draw.make_plan(key, held, sizes.drawn)  # the same on all devices: ranks of the union, which are its slots
    me = lax.axis_index(AXIS)
    first, end = plan.first[me], plan.first[me + 1]
    # One block holds what a device has to supply, almost always; where it does not, there are more.
    size = min(sizes.drawn, sizes.here, sizes.chunk, six_sigma(sizes.drawn / sizes.devices, 1))
    return functools.partial(_drawn_chunk, sizes, size, state.shard, plan.rank, first, end), -(-(end - first) // size)


def _drawn_chunk(
    sizes: Sizes, size: int, shard: Shard, rank: jax.Array, first: jax.Array, end: jax.Array, i: jax.Array
) -> Block:
    position = first + i * size + jnp.arange(size, dtype=jnp.int32)
    slot = jnp.where(position < end, rank.at[position].get(mode="clip") - sizes.base(), 0)
    stored, key, ids = shard_lib.read(shard, slot)
    return Block(stored, key, (position < end) & (ids >= 0))


def previous(sizes: Sizes, state: BankState, ids: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    slot = ids - sizes.base()
    stored, _, found = shard_lib.read(state.shard, jnp.clip(slot, 0, sizes.here - 1))
    mine = (slot >= 0) & (slot < sizes.here) & (found == ids) & (ids >= 0)
    return {side: jnp.where(mine[:, None], storage_lib.decode(stored[side]), 0) for side in sizes.sides}, mine


def pack(sizes: Sizes, pair: Sequence[jax.Array], step: jax.Array) -> PyTree:
    both = zip(SIDES, pair, strict=True)
    kept = {side: storage_lib.encode(sizes.storage, x) for side, x in both if side in sizes.sides}
    return kept | {"step": jnp.full((len(pair[0]),), step, jnp.int32)}


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
    devices, policy = mesh.shape[AXIS], None
    # Any number of devices that divides 128 divides the rows alike, so that they may share a checkpoint.
    rows = -(-capacity // math.lcm(128, devices)) * math.lcm(128, devices)
    if kind == "fifo":
        rows, policy = capacity, make_policy("fifo", capacity=capacity, shards=1)
    sizes = Sizes(capacity, rows // devices, devices, dim, drawn, storage, sides, chunk, policy)
    on = functools.partial
    start = mesh_lib.on_mesh(mesh, on(init, sizes), (), specs())
    return Bank(
        init=start,
        insert=on(insert, sizes),
        reader=on(read_drawn if drawn else read_all, sizes),
        previous=on(previous, sizes),
        pack=on(pack, sizes),
        capacity=capacity,
        dim=dim,
        drawn=drawn or capacity,
        sides=sides,
        num_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(start))),
    )
