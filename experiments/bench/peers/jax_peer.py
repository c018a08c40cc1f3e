"""What the JAX peers share: devices, and one compiled step that inserts and then draws, with the state donated."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.bench.peers.protocol import Missing, Peer, Rows, fill_chunks, random_rows

Step = Callable[[Any, Any, jax.Array], tuple[Any, Any]]  # (state, rows, key) -> (state, drawn)
Insert = Callable[[Any, Any], Any]  # (state, rows) -> state


def start(devices: int) -> None:
    """Makes sure of `devices` devices, fake ones on a CPU; must run before anything else of jax."""
    jax.config.update("jax_num_cpu_devices", devices)
    if len(jax.devices()) < devices:
        raise Missing(f"needs {devices} devices, {jax.default_backend()} has {len(jax.devices())}")


def record(rows: Rows) -> dict[str, np.ndarray]:
    """Rows as a pytree."""
    return {"image": rows[0], "label": rows[1]}


def one_record(row_shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """A record without the leading axis of rows, for buffers that want an example."""
    return jax.tree.map(lambda x: jax.numpy.asarray(x[0]), record(random_rows(1, row_shape, seed=0)))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree, over all devices."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def version(package_version: str) -> str:
    """A version for the report, with that of jax."""
    return f"{package_version}, jax {jax.__version__}"


def device(devices: int) -> str:
    """Where it runs, for the report."""
    return f"{devices} x {jax.devices()[0].device_kind}"


class DonatedPeer(Peer):
    """A peer whose step is one jitted function of a donated state; a subclass's `__init__` ends with `bind`."""

    def bind(
        self,
        state: Any,
        step: Step,
        insert: Insert,
        capacity: int,
        row_shape: tuple[int, ...],
        batch: int,
        sharding: jax.sharding.Sharding | None = None,
    ) -> None:
        """Compiles the step. `capacity` and `batch` are over all devices, split by `sharding`."""

        def run(state, rows, key):
            key, now = jax.random.split(key)
            return *step(state, rows, now), key

        self.device = device(1 if sharding is None else sharding.num_devices)
        self._sharding, self._capacity, self._row_shape = sharding, capacity, row_shape
        self._state, self._key = state, jax.random.key(0)
        self._insert = jax.jit(insert, donate_argnums=0)
        self._run = jax.jit(run, donate_argnums=(0, 2))
        rows = self.place(random_rows(batch, row_shape, seed=0))
        memory = self._run.lower(state, rows, self._key).compile().memory_analysis()
        self._temp_bytes = None if memory is None else int(memory.temp_size_in_bytes)

    def fill(self) -> None:
        for rows in fill_chunks(self._capacity, self._row_shape):
            self._state = jax.block_until_ready(self._insert(self._state, self.place(rows)))

    def place(self, rows: Rows) -> Any:
        return jax.device_put(record(rows), self._sharding)

    def step(self, batch: Any) -> None:
        self._state, drawn, self._key = self._run(self._state, batch, self._key)
        jax.block_until_ready((self._state, drawn))

    def bytes(self) -> int:
        return tree_bytes(self._state)

    def temp_bytes(self) -> int | None:
        return self._temp_bytes
