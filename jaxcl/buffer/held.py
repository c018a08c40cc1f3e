"""A memory as the host sees it: the shards of this process, leaf by leaf, in NumPy, some rows at a time."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcl.buffer import bits
from jaxcl.buffer.bits import Spec
from jaxcl.buffer.buffer import Sizes
from jaxcl.buffer.host.store import Store
from jaxcl.buffer.shard import Shard
from jaxcl.types import PyTree

CHUNK = 2**24  # bytes of rows that are on the host at once


@dataclasses.dataclass(frozen=True)
class Memory:
    """Where the rows of a buffer lie.

    Attributes:
      sizes: what is static of the buffer.
      name: of its policy, as given to `make_buffer`.
      empty: a state, abstract.
      mesh: None without one.
      host: the rows in host memory; None in the device tier.
    """

    sizes: Sizes
    name: str
    empty: Shard
    mesh: Mesh | None
    host: Store | None

    def shards(self, state: Shard) -> dict[int, Shard]:
        """The shards that this process answers for, by number: every row of the memory is in one of one process.

        Of a replicated memory, which every device holds whole, that is shard 0. Leaves are arrays of one device, `[slots, ...]`
        and `[1, ...]`; records of the host tier are NumPy's.
        """
        leaves, form = jax.tree.flatten(state)
        parts = [self.parts(leaf) for leaf in leaves]
        numbers = [n for n in sorted(parts[0]) if n == 0 or self.sizes.memory != "replicated"]
        found = {n: jax.tree.unflatten(form, [part[n] for part in parts]) for n in numbers}
        if self.host is None:
            return found
        self.host.drain()
        rows = self.host.payload()
        return {n: dataclasses.replace(shard, record=self.by_leaf(rows[n])) for n, shard in found.items()}

    def parts(self, leaf: jax.Array, *, replicas: bool = False) -> dict[int, jax.Array]:
        """Of a leaf of the state the parts on this process's devices, by the number of the shard; each once over all processes,
        or with `replicas` on every process that holds it."""
        if self.mesh is not None:  # as `init` has placed it; nothing moves where it lies so
            leaf = jax.device_put(leaf, self.sharding())
        return {
            (part.index[0].start or 0) * self.sizes.shards // len(leaf): part.data
            for part in leaf.addressable_shards
            if replicas or part.replica_id == 0
        }

    def by_leaf(self, rows: np.ndarray) -> PyTree:
        """Rows of the host tier `[n]` as a record of views `[n, ...]`, as it is stored."""
        assert rows.dtype.names is not None
        return jax.tree.unflatten(jax.tree.structure(self.sizes.stored), [rows[name] for name in rows.dtype.names])

    def place(self, shape: tuple[int, ...], rows: Callable[[Any], np.ndarray]) -> jax.Array:
        """A leaf of the state, as `init` places it; `rows` gives its parts by their index."""
        if self.mesh is None:
            return jnp.array(rows((slice(None),)))
        return jax.make_array_from_callback(shape, self.sharding(), rows)

    def sharding(self) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(self.sizes.axis))


def rows_at_once(*specs: Any) -> int:
    """How many rows of these arrays `[n, ...]` make a chunk."""
    return max(1, CHUNK // max(1, sum(int(np.prod(x.shape[1:])) * x.dtype.itemsize for x in specs)))


def pieces(x: Any, rows: int) -> Iterator[np.ndarray]:
    """An array `[n, ...]` of a device or of NumPy, `rows` at a time."""
    size = min(rows, len(x))
    for begin in range(0, len(x), rows):
        at = min(begin, len(x) - size)  # of one size, so that one program reads them all
        some = lax.dynamic_slice_in_dim(x, at, size) if isinstance(x, jax.Array) else x[at : at + size]
        yield np.asarray(some)[begin - at :]


def decoded(spec: Spec, stored: np.ndarray) -> Any:
    """A stored leaf `[n, ...]` in the dtype of `spec`, one record's: a NumPy array, keys a JAX one."""
    if bits.is_key(spec):
        return bits.from_bits(spec, jnp.asarray(stored))
    if stored.dtype == spec.dtype:
        return stored
    if np.issubdtype(spec.dtype, np.complexfloating):
        return np.ascontiguousarray(stored).view(spec.dtype)[..., 0]
    if jnp.issubdtype(spec.dtype, np.integer):
        return stored.astype(spec.dtype)
    return stored.view(spec.dtype)
