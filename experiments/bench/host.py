"""A memory in host memory from a quarter of a GiB upwards: rates of insert and draw, resident memory, cost by capacity.

    python -m experiments.bench.host --devices=2 [--gib=0.25,1,4] [--path=FOLDER] [--json=FILE]

Without a model: each step inserts the rows of a batch, every one of which is stored at a random slot of its class, and draws
as many. First the memory is filled by large batches, then steps are timed one by one, from the dispatch of a step to the
arrival of the rows it drew.
"""

import contextlib
from typing import Annotated, Any, Literal

import jax
import numpy as np

from experiments.bench import harness
from experiments.bench.harness import CLASSES, SHAPE, Contender
from experiments.pages.page import Json
from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Buffer, Rows, make_buffer
from jaxcl.buffer.host import Store
from jaxcl.mesh import ROWS, WHOLE
from jaxcl.training.step_host import HostStep


def measure(
    *,
    gib: Annotated[tuple[float, ...], "sizes of the memory in GiB"] = (0.25, 1, 4),
    path: Annotated[str | None, "folder for memory-mapped files; default: in memory"] = None,
    handover: Annotated[Literal["outputs", "callback"], "how rows leave the step"] = "outputs",
    batch: Annotated[int, "rows inserted and drawn in a timed step, over all devices"] = 256,
    fill: Annotated[int, "rows inserted in a step that fills the memory"] = 8192,
    steps: Annotated[int, "timed steps"] = 200,
) -> Json:
    mesh, sizes = mesh_lib.make_mesh(), []
    for size in gib:
        before = harness.resident()
        buffer = make_buffer(
            {"image": jax.ShapeDtypeStruct(SHAPE, np.uint8)},
            capacity=int(size * 2**30) // int(np.prod(SHAPE)),
            representatives=batch,
            policy="class_random",
            num_classes=CLASSES,
            accept=1.0,
            mesh=mesh,
            tier="host",
            path=path,
            handover=handover,
        )
        one = {"gib": size, "capacity": buffer.capacity, **one_size(buffer, mesh, batch, fill, steps)}
        one["resident_bytes"] = {"before": before, "after": harness.resident()}
        sizes.append(one)
        harness.show(one)
    return {"batch": batch, "handover": handover, "sizes": sizes}


def one_size(buffer: Buffer, mesh: jax.sharding.Mesh, batch: int, fill: int, steps: int) -> Json:
    """Fills the buffer, then times `steps` steps of `batch` rows."""
    assert buffer.host is not None
    store = buffer.host
    program = insert_and_draw(buffer, mesh)
    state: Any = (mesh_lib.replicate(mesh, np.int32(0)), buffer.init(), (buffer.no_rows(),))
    with store.serving(0, state[2]):
        filling = contender(program, store, state, harness.made_up_rows(mesh, fill))
        filling.run(1)
        fill_seconds = filling.run(-(-int(1.02 * buffer.capacity) // fill))
        stepping = contender(program, store, filling.state, harness.made_up_rows(mesh, batch))
        stepping.run(20)
        before = dict(store.seconds)
        step_ms = stepping.turns(steps)
        writer_ms = {name: 1e3 * (store.seconds[name] - before[name]) / steps for name in before}
        state, drawn = stepping.step(stepping.state, stepping.batch)
    assert np.asarray(drawn.valid).all()
    return {
        "rows": buffer.stats(state[1])["rows"],
        "fill_rows_per_second": fill / fill_seconds,
        "step_ms": step_ms,
        "insert_and_draw_rows_per_second": 1e3 * batch / step_ms["median"],
        "writer_ms": writer_ms,
        "stored_rows_per_writer_second": 1e3 * batch / writer_ms["populate"],
        "gathered_rows_per_writer_second": 1e3 * mesh.size * store.narrow / writer_ms["sample"],
        "host_bytes": store.num_bytes,
    }


def contender(program: Any, store: Store, state: Any, batch: Rows) -> Contender:
    """A step of the host tier that returns when the rows it drew have arrived."""
    step = HostStep(store, program).prepare(state, batch, contextlib.nullcontext)

    def waiting(state: Any, batch: Rows) -> tuple[Any, Any]:
        found = step(state, batch)
        store.take()
        return found

    return Contender(waiting, state, batch)


def insert_and_draw(buffer: Buffer, mesh: jax.sharding.Mesh) -> Any:
    """A step without training: jitted `(state, batch, arrived) -> (state, drawn rows, hand-over)`."""

    def step(state: Any, batch: Rows, arrived: jax.Array) -> tuple[Any, Any, Any]:
        number, shard, staged = state
        insert_key, draw_key = jax.random.split(jax.random.fold_in(jax.random.key(0), number))
        (drawn,) = buffer.local.receive(staged, arrived)
        shard, staged, handover = buffer.local.turn(shard, batch, insert_key, [draw_key], number)
        return (number + 1, shard, staged), drawn, handover

    specs = (WHOLE, ROWS, ROWS)
    return mesh_lib.on_mesh(mesh, step, (specs, ROWS, ROWS), (specs, ROWS, ROWS), donate=0)


if __name__ == "__main__":
    harness.run(measure)
