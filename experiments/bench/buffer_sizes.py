"""What insert and draw of jaxcl's buffer cost by batch, by policy, by dtype and by number of devices.

    python -m experiments.bench.buffer_sizes --json=experiments/results/bench_buffer_sizes.json --devices=16

Rows are small (64 numbers), so that what is measured is deciding and moving, not the bytes. Times are of one compiled call that
is waited for. About five minutes on two cores.
"""

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import harness
from experiments.bench.harness import Contender
from experiments.pages.page import Json
from jaxcl import cli
from jaxcl import mesh as mesh_lib
from jaxcl.buffer import POLICIES, Buffer, Rows, make_buffer
from jaxcl.check import at_least, check

WIDTH = 64  # numbers of a row
DTYPES = ("uint8", "int32", "float32", "bfloat16", "float16", "float8_e4m3fn", "complex64", "int4")
SAMPLINGS = ("uniform", "class_balanced", "weighted", "uniform_with_replacement", "weighted_with_replacement")


def measure(
    *,
    batches: Annotated[tuple[int, ...], "rows in, or rows out, of one call on one device"] = (64, 1024, 16384, 65536),
    capacities: Annotated[tuple[int, ...], "rows of the memory for which dtypes are measured"] = (4096, 262144),
    rows: Annotated[int, "rows in and rows out a device where devices are measured"] = 64,
    runs: Annotated[int, "calls of each"] = 15,
) -> Json:
    check("--devices", cli.DEVICES.value or 1, at_least(1))
    inserts = [by_batch(policy, n, runs) for policy in POLICIES for n in batches]
    draws = [by_draw(sampling, n, runs) for sampling in SAMPLINGS for n in batches if n <= 16384]
    dtypes = [by_dtype(dtype, capacities, runs) for dtype in DTYPES]
    counts = [n for n in (1, 2, 4, 8, 16) if n <= jax.device_count()]
    devices = [by_devices(sampling, n, rows, runs) for sampling in ("uniform", "weighted") for n in counts]
    return {"inserts": inserts, "draws": draws, "dtypes": dtypes, "device_counts": devices}


def by_batch(policy: str, n: int, runs: int) -> Json:
    """An insert of `n` rows into a full buffer on one device."""
    buffer = make_buffer(row_of("uint8"), capacity=4 * n, representatives=1, policy=policy, num_classes=100, accept=0.5)
    given = rows_of("uint8", n, classes=100)

    def insert(state: Any, rows: Rows, key: jax.Array) -> tuple[Any, None]:
        return buffer.insert(state, rows, key), None

    return shown(
        {"policy": policy, "rows": n, **timed(insert, (given, jax.random.key(0)), filled(buffer, given), runs)}
    )


def by_draw(sampling: str, n: int, runs: int) -> Json:
    """A draw of `n` rows from a full buffer on one device."""
    buffer = make_buffer(
        row_of("uint8"),
        capacity=4 * n,
        representatives=n,
        policy="class_balanced",
        num_classes=100,
        sampling=sampling,
    )
    state = filled(buffer, rows_of("uint8", n, classes=100))

    def draw(state: Any, key: jax.Array) -> tuple[Any, Any]:
        return state, buffer.draw(state, key)

    return shown({"sampling": sampling, "rows": n, **timed(draw, (jax.random.key(0),), state, runs)})


def by_dtype(dtype: str, capacities: tuple[int, ...], runs: int) -> Json:
    """Insert and draw of 64 rows of a dtype at several capacities."""
    found = []
    for capacity in capacities:
        buffer = make_buffer(row_of(dtype), capacity=capacity, representatives=64)
        given = rows_of(dtype, 64)
        found.append({"capacity": capacity, **insert_and_draw(buffer, given, runs)})
    return shown({"dtype": dtype, "capacities": found})


def by_devices(sampling: str, n: int, rows: int, runs: int) -> Json:
    """Insert and draw of `rows` rows a device over `n` devices."""
    mesh = mesh_lib.make_mesh(jax.devices()[:n])
    buffer = make_buffer(row_of("uint8"), capacity=4096 * n, representatives=rows * n, mesh=mesh, sampling=sampling)
    given = mesh_lib.shard_rows(mesh, rows_of("uint8", rows * n))
    return shown({"sampling": sampling, "devices": n, **insert_and_draw(buffer, given, runs)})


def row_of(dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((WIDTH,), jnp.dtype(dtype))


def rows_of(dtype: str, n: int, classes: int = 1) -> Rows:
    """`n` random rows."""
    numbers = np.random.default_rng(0).integers(0, 8, (n, WIDTH))
    number = np.arange(n, dtype=np.int32)
    return jax.tree.map(jnp.asarray, Rows(numbers.astype(jnp.dtype(dtype)), number % classes, number))


def filled(buffer: Buffer, given: Rows) -> Any:
    """The state of a buffer that has been given more rows than it holds."""
    state, insert = buffer.init(), jax.jit(buffer.insert, donate_argnums=0)
    for i in range(buffer.capacity // len(given.id) + 1):
        state = insert(state, given, jax.random.key(i))
    return state


def insert_and_draw(buffer: Buffer, given: Rows, runs: int) -> Json:
    """Of a full buffer."""
    return timed(buffer.insert_and_draw, (given, jax.random.key(0)), filled(buffer, given), runs)


def timed(function: Callable, args: tuple[Any, ...], state: Any, runs: int) -> Json:
    """Milliseconds of a call `(state, *args) -> (state, anything)` in place, and its temporaries in bytes."""
    compiled = jax.jit(function, donate_argnums=0).lower(state, *args).compile()
    memory = compiled.memory_analysis()
    contender = Contender(lambda state, _: jax.block_until_ready(compiled(state, *args)), state)
    contender.run(2)
    return {"ms": contender.turns(runs), "temp_bytes": None if memory is None else int(memory.temp_size_in_bytes)}


def shown(record: Json) -> Json:
    harness.show(record)
    return record


if __name__ == "__main__":
    harness.run(measure)
