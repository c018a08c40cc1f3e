"""A memory in host memory from a quarter of a GiB upwards: rates of insert and draw, resident memory, cost by capacity.

    python -m experiments.bench.host --json=experiments/results/bench_host.json --devices=2 [--gib=0.25,1,4] [--path=FOLDER]

Without a model: each step inserts the rows of a batch, every one of which is stored at a random slot of its class, and draws
as many. First the memory is filled by large batches, then steps are timed one by one, from the dispatch of a step to the
arrival of the rows it drew.
"""

import contextlib
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import PartitionSpec

from experiments import cli
from experiments.bench.environment import environment
from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows, make_buffer
from jaxcl.mesh import AXIS
from jaxcl.training.step_host import HostStep

GIB = flags.DEFINE_list("gib", ["0.25", "1", "4"], "sizes of the memory in GiB")
PATH = flags.DEFINE_string("path", None, "folder for memory-mapped files; default: in memory")
HANDOVER = flags.DEFINE_enum("handover", "outputs", ["outputs", "callback"], "how rows leave the step")
BATCH = flags.DEFINE_integer("batch", 256, "rows inserted and drawn in a timed step, over all devices")
FILL = flags.DEFINE_integer("fill", 8192, "rows inserted in a step that fills the memory")
STEPS = flags.DEFINE_integer("steps", 200, "timed steps")

CLASSES, SHAPE = 100, (32, 32, 3)


def resident() -> int:
    """Bytes of this process in RAM."""
    line = next(x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


def batch_of(mesh: jax.sharding.Mesh, rows: int) -> Any:
    rng = np.random.default_rng(0)
    record = {"image": rng.integers(0, 255, (rows, *SHAPE), np.uint8)}
    label = rng.permutation(np.arange(rows, dtype=np.int32) % CLASSES)
    rest: Any = (label, np.arange(rows, dtype=np.int32), np.ones(rows, bool))
    return mesh_lib.shard_rows(mesh, Rows(record, *rest))


def measure(mesh: jax.sharding.Mesh, gib: float) -> dict[str, Any]:
    row_bytes = int(np.prod(SHAPE))
    capacity = int(gib * 2**30) // row_bytes
    before = resident()
    buffer = make_buffer(
        {"image": jax.ShapeDtypeStruct(SHAPE, np.uint8)},
        capacity=capacity,
        representatives=BATCH.value,
        policy="class_random",
        num_classes=CLASSES,
        accept=1.0,
        mesh=mesh,
        tier="host",
        path=PATH.value,
        handover=HANDOVER.value,
    )
    assert buffer.host is not None
    store = buffer.host

    def step(state: Any, batch: Rows, arrived: jax.Array) -> tuple[Any, Any, Any]:
        number, shard, staged = state
        insert_key, draw_key = jax.random.split(jax.random.fold_in(jax.random.key(0), number))
        (drawn,) = buffer.local.receive(staged, arrived)
        shard, staged, handover = buffer.local.turn(shard, batch, insert_key, [draw_key], number)
        return (number + 1, shard, staged), drawn, handover

    split, whole = PartitionSpec(AXIS), PartitionSpec()
    specs: Any = (whole, split, split)
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, split, split), out_specs=(specs, split, split), check_vma=False
    )
    prepare = HostStep(store, jax.jit(mapped, donate_argnums=0)).prepare
    state: Any = (mesh_lib.replicate(mesh, np.int32(0)), buffer.init(), (buffer.no_rows(),))
    fill_batch, batch = batch_of(mesh, FILL.value), batch_of(mesh, BATCH.value)
    with store.serving(0, state[2]):
        one = prepare(state, fill_batch, lambda name: contextlib.nullcontext())
        steps = -(-int(1.02 * capacity) // FILL.value)
        state, _ = one(state, fill_batch)
        store.take()
        begin = time.perf_counter()
        for _ in range(steps):
            state, _ = one(state, fill_batch)
        store.take()
        fill_seconds = time.perf_counter() - begin
        one = prepare(state, batch, lambda name: contextlib.nullcontext())
        for _ in range(20):
            state, _ = one(state, batch)
        store.take()
        writer, seconds = dict(store.seconds), []
        for _ in range(STEPS.value):
            begin = time.perf_counter()
            state, drawn = one(state, batch)
            store.take()
            seconds.append(time.perf_counter() - begin)
        valid = np.asarray(drawn.valid)
        per_step = {name: 1e3 * (store.seconds[name] - writer[name]) / STEPS.value for name in writer}
    assert valid.all()
    ms = 1e3 * np.array(seconds)
    return {
        "gib": gib,
        "capacity": capacity,
        "rows": buffer.stats(state[1])["rows"],
        "fill_rows_per_second": steps * FILL.value / fill_seconds,
        "step_ms": {
            "median": float(np.median(ms)),
            "p10": float(np.quantile(ms, 0.1)),
            "p90": float(np.quantile(ms, 0.9)),
        },
        "insert_and_draw_rows_per_second": BATCH.value / float(np.median(seconds)),
        "writer_ms": per_step,
        "stored_rows_per_writer_second": BATCH.value / (1e-3 * per_step["populate"]),
        "gathered_rows_per_writer_second": mesh.size * store.narrow / (1e-3 * per_step["sample"]),
        "host_bytes": store.num_bytes,
        "resident_bytes": {"before": before, "after": resident()},
    }


def main() -> None:
    mesh = mesh_lib.make_mesh()
    found = []
    for gib in map(float, GIB.value):
        one = measure(mesh, gib)
        found.append(one)
        print(
            f"{gib:g} GiB: {one['rows']:,} rows; filled at {one['fill_rows_per_second']:,.0f} rows/s;"
            f" step {one['step_ms']['median']:.2f} ms for {BATCH.value} rows in and out; writer, ms a step:"
            f" {', '.join(f'{name} {ms:.2f}' for name, ms in one['writer_ms'].items())};"
            f" resident {one['resident_bytes']['after'] / 2**30:.2f} GiB",
            flush=True,
        )
    if cli.JSON.value:
        settings = {"batch": BATCH.value, "handover": HANDOVER.value, "path": PATH.value, "devices": mesh.size}
        pathlib.Path(cli.JSON.value).write_text(
            json.dumps({**settings, "sizes": found, **environment()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    cli.run(main)
