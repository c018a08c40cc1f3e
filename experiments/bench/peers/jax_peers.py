"""Buffers in JAX: jaxcl's own, flashbax's and brax's, each on the devices of one process."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.peers import protocol
from experiments.bench.peers.protocol import Images, Missing, Peer, Sizes, random_rows

Step = Callable[[Any, Any, jax.Array], tuple[Any, Any]]  # (state, rows, key) -> (state, drawn)
Insert = Callable[[Any, Any], Any]  # (state, rows) -> state


def record(rows: Images) -> dict[str, np.ndarray]:
    """Rows as a pytree."""
    return {"image": rows[0], "label": rows[1]}


def one_record() -> dict[str, jax.Array]:
    """A record without the leading axis of rows, for buffers that want an example."""
    return jax.tree.map(lambda x: jnp.asarray(x[0]), record(random_rows(1, seed=0)))


class JaxPeer(Peer):
    """A peer with a state of JAX arrays, split by `sharding` if it has one."""

    sharding: jax.sharding.Sharding | None = None
    state: Any

    def started(self, version: str) -> None:
        """Starts JAX on `sizes.devices` devices, fake ones on a CPU; must be called before anything else of JAX."""
        devices = self.sizes.devices
        jax.config.update("jax_num_cpu_devices", devices)
        if len(jax.devices()) < devices:
            raise Missing(f"needs {devices} devices, {jax.default_backend()} has {len(jax.devices())}")
        self.version = f"{version}, jax {jax.__version__}"
        self.device = f"{devices} x {jax.devices()[0].device_kind}"

    def place(self, rows: Images) -> Any:
        return jax.device_put(record(rows), self.sharding)

    def bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.state))


class DonatedPeer(JaxPeer):
    """A peer whose step is one jitted function of a donated state; a subclass's `__init__` ends with `bind`. With several
    `steps` they are scanned in one call, on the same batch."""

    def bind(self, state: Any, step: Step, insert: Insert) -> None:
        """Compiles the step."""

        def run(state, rows, key):
            key, now = jax.random.split(key)
            if self.steps == 1:
                return *step(state, rows, now), key

            def once(carry, key):  # the rows drawn are carried, or nobody would need those of any step but the last
                return step(carry[0], rows, key), None

            drawn = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, state, rows, now)[1])
            return *jax.lax.scan(once, (state, drawn), jax.random.split(now, self.steps))[0], key

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


class Jaxcl(DonatedPeer):
    """jaxcl's own buffer, measured by the same loop as its peers: reservoir, on one device or over several."""

    name = "jaxcl"
    note = "reservoir; draws from the union of all shards without replacement"
    peak = 1.3
    one_device = False
    policy = "reservoir"
    sampling = "uniform"

    def __init__(self, sizes: Sizes) -> None:
        import jaxcl
        from jaxcl import mesh as mesh_lib
        from jaxcl.buffer import Rows, make_buffer

        super().__init__(sizes)
        self.started(jaxcl.__version__)
        devices = sizes.devices
        mesh = None if devices == 1 else mesh_lib.make_mesh(jax.devices()[:devices])
        self.sharding = None if mesh is None else mesh_lib.by_rows(mesh)
        buffer = make_buffer(
            {"image": one_record()["image"]},
            capacity=sizes.capacity * devices,
            representatives=sizes.batch * devices,
            policy=self.policy,
            sampling=self.sampling,
            mesh=mesh,
        )

        def insert(state: Any, rows: dict[str, jax.Array], key: jax.Array | None = None) -> Any:
            label = rows["label"]
            given = Rows({"image": rows["image"]}, label, id=label, valid=jnp.ones_like(label, bool))
            return buffer.insert(state, given, jax.random.key(1) if key is None else key)

        def insert_and_draw(state: Any, rows: dict[str, jax.Array], key: jax.Array) -> tuple[Any, Any]:
            insert_key, draw_key = jax.random.split(key)
            state = insert(state, rows, insert_key)
            drawn = buffer.draw(state, draw_key)
            if self.sampling == "weighted":
                state = buffer.update_weights(state, drawn, new_weights(draw_key, len(drawn.id)))
            return state, drawn

        self.bind(buffer.init(), insert_and_draw, insert)


def new_weights(key: jax.Array, n: int) -> jax.Array:
    """Weights that the drawn rows get, as a loss would give them; float32 `[n]`."""
    return jax.random.uniform(key, (n,), jnp.float32, 0.1, 2.0)


class JaxclWeighted(Jaxcl):
    """The same with draws in proportion to weights, which every drawn row gets anew."""

    name = "jaxcl_weighted"
    note = "as jaxcl; draws by weight, without replacement, and gives the drawn rows new weights"
    sampling = "weighted"


class Flashbax(DonatedPeer):
    """flashbax's item buffer: a ring on one device, drawn from uniformly. Add and sample are jitted together with the state
    donated, which is how it is fastest."""

    name = "flashbax"
    note = "overwrites the oldest; draws with replacement"
    peak = 1.2

    def __init__(self, sizes: Sizes) -> None:
        import flashbax

        super().__init__(sizes)
        self.started(importlib.metadata.version("flashbax"))
        buffer = flashbax.make_item_buffer(
            max_length=sizes.capacity, min_length=1, sample_batch_size=sizes.batch, add_batches=True
        )

        def add_and_sample(state: Any, rows: Any, key: Any) -> tuple[Any, Any]:
            state = buffer.add(state, rows)
            return state, buffer.sample(state, key).experience

        self.bind(buffer.init(one_record()), add_and_sample, buffer.add)


class JaxclScan(Jaxcl):
    """jaxcl's, many steps a call."""

    name = "jaxcl_scan"
    steps = 100
    note = "as jaxcl, 100 steps scanned in a call; a full reservoir stores ever fewer of the rows that come"


class JaxclFifoScan(JaxclScan):
    """jaxcl's as a ring, in which every row is stored."""

    name = "jaxcl_fifo_scan"
    note = "as jaxcl_scan, but overwrites the oldest: stores every row"
    policy = "fifo"


class FlashbaxScan(Flashbax):
    """flashbax's, many steps a call."""

    name = "flashbax_scan"
    steps = 100
    note = "as flashbax, 100 steps scanned in a call"


class FlashbaxPrioritised(DonatedPeer):
    """flashbax's prioritised item buffer: as its other one, with new priorities for the drawn rows in the same program."""

    name = "flashbax_prioritised"
    note = "as flashbax; draws by priority, with replacement, and gives the drawn rows new priorities"
    peak = 1.2

    def __init__(self, sizes: Sizes) -> None:
        import flashbax

        super().__init__(sizes)
        self.started(importlib.metadata.version("flashbax"))
        buffer = flashbax.make_prioritised_item_buffer(
            max_length=sizes.capacity,
            min_length=1,
            sample_batch_size=sizes.batch,
            add_batches=True,
            priority_exponent=1.0,
            device=jax.default_backend(),
        )

        def add_and_sample(state: Any, rows: Any, key: Any) -> tuple[Any, Any]:
            state = buffer.add(state, rows)
            sample = buffer.sample(state, key)
            state = buffer.set_priorities(state, sample.indices, new_weights(key, sizes.batch))
            return state, sample.experience

        self.bind(buffer.init(one_record()), add_and_sample, buffer.add)


class BraxRaw(DonatedPeer):
    """brax's UniformSamplingQueue on one device. A row is ravelled to one dtype, int32 here, and a full queue is rolled as a
    whole at every insert. Insert and sample are jitted together with the state donated, as in brax's own training loops."""

    name = "brax"
    note = "stores int32; rolls the whole queue at every insert; draws with replacement"
    peak = 10.0

    def __init__(self, sizes: Sizes) -> None:
        from brax.training import replay_buffers

        super().__init__(sizes)
        self.started(importlib.metadata.version("brax"))
        queue = replay_buffers.UniformSamplingQueue(sizes.capacity, one_record(), sizes.batch)

        def insert_and_sample(state: Any, rows: Any, key: Any) -> tuple[Any, Any]:
            del key  # brax keeps one in its state
            return queue.sample_internal(queue.insert_internal(state, rows))

        self.bind(queue.init(jax.random.PRNGKey(0)), insert_and_sample, queue.insert_internal)


class BraxSharded(JaxPeer):
    """The same queue sharded as brax shards it: insert and sample are those of its `PjitWrapper`."""

    name = "brax_sharded"
    note = "as brax, a queue a device; each device draws from its own rows only; nothing donated"
    peak = 12.0
    one_device = False

    def __init__(self, sizes: Sizes) -> None:
        from brax.training import replay_buffers

        super().__init__(sizes)
        self.started(importlib.metadata.version("brax"))
        mesh = jax.sharding.Mesh(np.array(jax.devices()[: sizes.devices]), ("x",))
        self.sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        queue = replay_buffers.UniformSamplingQueue(sizes.capacity, one_record(), sizes.batch)
        self._queue = replay_buffers.PjitWrapper(queue, mesh=mesh, axis_names=("x",))
        self.state = self._queue.init(jax.random.PRNGKey(0))
        self.chunk = max(sizes.capacity * sizes.devices // 4, 1)  # each insert copies the whole queue

    def insert(self, rows: Any) -> None:
        self.state = jax.block_until_ready(self._queue.insert(self.state, rows))

    def step(self, batch: Any) -> None:
        self.state = self._queue.insert(self.state, batch)
        self.state, drawn = self._queue.sample(self.state)
        jax.block_until_ready((self.state, drawn))


if __name__ == "__main__":
    protocol.main(
        Jaxcl,
        JaxclWeighted,
        JaxclScan,
        JaxclFifoScan,
        Flashbax,
        FlashbaxScan,
        FlashbaxPrioritised,
        BraxRaw,
        BraxSharded,
    )
