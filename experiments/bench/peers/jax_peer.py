"""What the JAX peers share: devices, and one compiled step that inserts and then draws, with the state donated."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.bench.peers.protocol import Images, Missing, Peer, random_rows

Step = Callable[[Any, Any, jax.Array], tuple[Any, Any]]  # (state, rows, key) -> (state, drawn)
Insert = Callable[[Any, Any], Any]  # (state, rows) -> state


def start(devices: int) -> None:
    """Makes sure of `devices` devices, fake ones on a CPU; must run before anything else of jax."""
    jax.config.update("jax_num_cpu_devices", devices)
    if len(jax.devices()) < devices:
        raise Missing(f"needs {devices} devices, {jax.default_backend()} has {len(jax.devices())}")


def record(rows: Images) -> dict[str, np.ndarray]:
    """Rows as a pytree."""
    return {"image": rows[0], "label": rows[1]}


def one_record() -> dict[str, jax.Array]:
    """A record without the leading axis of rows, for buffers that want an example."""
    return jax.tree.map(lambda x: jax.numpy.asarray(x[0]), record(random_rows(1, seed=0)))


class JaxPeer(Peer):
    """A peer with a state of JAX arrays, split by `sharding` if it has one."""

    sharding: jax.sharding.Sharding | None = None
    state: Any

    def started(self, package_version: str) -> None:
        """Starts JAX on the devices; must be called first."""
        start(self.sizes.devices)
        self.version = f"{package_version}, jax {jax.__version__}"
        self.device = f"{self.sizes.devices} x {jax.devices()[0].device_kind}"

    def place(self, rows: Images) -> Any:
        return jax.device_put(record(rows), self.sharding)

    def bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.state))


class DonatedPeer(JaxPeer):
    """A peer whose step is one jitted function of a donated state; a subclass's `__init__` ends with `bind`."""

    def bind(self, state: Any, step: Step, insert: Insert) -> None:
        """Compiles the step."""

        def run(state, rows, key):
            key, now = jax.random.split(key)
            return *step(state, rows, now), key

        self.state, self._key = state, jax.random.key(0)
        self._insert = jax.jit(insert, donate_argnums=0)
        self._run = jax.jit(run, donate_argnums=(0, 2))
        rows = self.place(random_rows(self.sizes.batch * self.sizes.devices, seed=0))
        memory = self._run.lower(state, rows, self._key).compile().memory_analysis()
        self.temp_bytes = None if memory is None else int(memory.temp_size_in_bytes)

    def insert(self, rows: Any) -> None:
        self.state = jax.block_until_ready(self._insert(self.state, rows))

    def step(self, batch: Any) -> None:
        self.state, drawn, self._key = self._run(self.state, batch, self._key)
        jax.block_until_ready((self.state, drawn))
