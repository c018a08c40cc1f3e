"""Rehearsal overhead: the time of a step with b new and r drawn rows over a plain step on b + r new rows.

    python -m experiments.bench.step --devices=8 [--models=mlp,resnet18] [--host] [--json=FILE]

Same model, optimiser and process, the kinds of step in turn, each turn of a few steps ended by blocking; the ratio is taken
turn by turn, so that what else the machine does hits all. The plain step trains on as many rows; it differs in nothing but
insert, draw and exchange. Two more steps say how to read the ratio: a second plain step, compiled and allocated anew (the
control: how far from 1 a ratio of equals comes out), and a plain step with nothing but the bare collectives beside it, as
many bytes as the exchange sends (the floor: no exchange on these devices can cost less). Beside the ratios: images a second,
the collectives of a step, and the time of insert and draw compiled alone. On a GPU give --dtype=bfloat16 and larger sizes; the
goal is a ratio of 1.02.

With --host also the tier in host memory, by either way of handing rows over: its step time over that of the device tier
(goal 1.05), how long the loop waits, and how much of the writer's work (storing, gathering, starting the transfer) the step
hides: in further turns that wait for every step to end, the share of that work which is done by then.
"""

import dataclasses
import functools
import time
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from matplotlib.figure import Figure

from experiments.bench import harness, hlo
from experiments.bench.harness import CLASSES, SHAPE, Contender
from experiments.pages.page import Json
from jaxcl import data
from jaxcl import mesh as mesh_lib
from jaxcl.buffer import HANDOVERS, Buffer, make_buffer
from jaxcl.buffer.host import Store
from jaxcl.mesh import AXIS, ROWS, WHOLE
from jaxcl.models import make_model
from jaxcl.runs.session import Phases
from jaxcl.strategies import make_strategy
from jaxcl.training.learn import Bound
from jaxcl.training.state import TrainState, initial_state, make_weights
from jaxcl.training.step import joins, make_train_step
from jaxcl.types import Batch, PyTree

IMAGE = {"image": jax.ShapeDtypeStruct(SHAPE, np.uint8)}
KINDS = {
    "overhead": ("rehearsal", "#0072B2"),
    "floor": ("bare collectives", "#D55E00"),
    "control": ("plain again", "0.5"),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed: the options of the command."""

    mesh: Mesh
    dtype: str
    width: int
    new: int
    drawn: int
    capacity: int
    runs: int
    steps: int

    def buffer(self, record: PyTree = IMAGE, **options: Any) -> Buffer:
        return make_buffer(
            record,
            capacity=self.capacity * self.mesh.size,
            representatives=self.drawn * self.mesh.size,
            policy="class_random",
            num_classes=CLASSES,
            accept=0.25,
            mesh=self.mesh,
            **options,
        )

    def contender(self, model_name: str, buffer: Buffer | None) -> Contender:
        """Rehearsal with a full `buffer` on b rows a device, or a plain step on b + r."""
        strategy = "incremental" if buffer is None else "er"
        program, state, batch = self.step(model_name, buffer, strategy=strategy)
        if buffer is not None:
            state = dataclasses.replace(state, buffer=full(buffer, self.mesh))
        return Contender(program, state, batch)

    def step(
        self, model_name: str, buffer: Buffer | None, *, strategy: str, prior: str = "none"
    ) -> tuple[Any, TrainState, Batch]:
        """The step of `make_train_step`, of the device tier its program, with a state and a batch for it."""
        options: dict[str, Any] = {"hidden": (100, 100)} if model_name == "mlp" else {"width": self.width}
        model = make_model(model_name, CLASSES, options=options, dtype=self.dtype, axis_name=AXIS)
        rule = make_strategy(strategy)
        optimizer, schedule = optax.trace(0.9), optax.constant_schedule(0.01)
        images, classes = (data.make_augment((), SHAPE), data.make_normalize(SHAPE)), np.ones((1, CLASSES), bool)
        bound = Bound(self.mesh, model, rule, buffer, optimizer, schedule, *images, classes, prior=prior)
        step = make_train_step(bound, 0)
        weights = make_weights(self.mesh, model, optimizer, SHAPE)(jax.random.key(0))
        state = initial_state(self.mesh, weights, buffer, rule, None if prior == "none" else CLASSES)
        rows = self.new + (self.drawn if buffer is None else 0)
        program: Any = step if buffer is not None and buffer.host is not None else step.program
        return program, state, harness.made_up(self.mesh, rows * self.mesh.size)


def measure(
    *,
    models: Annotated[tuple[str, ...], "models to time"] = ("mlp", "convnet", "resnet18"),
    dtype: Annotated[Literal["float32", "bfloat16"], "of the computation"] = "float32",
    width: Annotated[int, "of the convolutional models"] = 16,
    new: Annotated[int, "b: new rows a device, the paper's"] = 56,
    drawn: Annotated[int, "r: representatives a device, the paper's"] = 7,
    capacity: Annotated[int, "rows of the buffer a device"] = 1000,
    runs: Annotated[int, "timed turns of each kind"] = 30,
    steps: Annotated[int, "steps in a turn"] = 5,
    host: Annotated[bool, "also time the tier in host memory"] = False,
) -> Json:
    sizes, found = Sizes(mesh_lib.make_mesh(), dtype, width, new, drawn, capacity, runs, steps), []
    for model in models:
        found.append({**one_model(sizes, model), "host": measure_host(sizes, model) if host else {}})
        harness.show(found[-1])
    return {"models": found}


def one_model(sizes: Sizes, model: str) -> Json:
    """The device tier beside plain steps, control and floor, in turn."""
    buffer, devices = sizes.buffer(), sizes.mesh.size
    plain, control = (compiled(sizes.contender(model, None)) for _ in range(2))
    rehearsal = compiled(sizes.contender(model, buffer))
    floor = with_bare_collectives(sizes.mesh, sizes.contender(model, None), buffer.traffic)
    contenders = [plain, rehearsal, control, floor]
    for one in contenders:
        one.run(sizes.steps)
    harness.in_turn(contenders, sizes.runs, sizes.steps)
    step_ms = {"rehearsal": harness.spread(rehearsal.seconds), "plain": harness.spread(plain.seconds)}
    rows = (sizes.new + sizes.drawn) * devices
    programs: dict[str, Any] = {"rehearsal": rehearsal.step, "plain": plain.step}
    return {
        "model": model,
        "dtype": sizes.dtype,
        "new": sizes.new,
        "drawn": sizes.drawn,
        "step_ms": step_ms,
        "overhead": harness.ratio(rehearsal, plain),
        "control": harness.ratio(control, plain),
        "floor": harness.ratio(floor, plain),
        "images_per_second": {kind: 1e3 * rows / ms["median"] for kind, ms in step_ms.items()},
        "alone_ms": alone(sizes, buffer),
        "collectives": {kind: hlo.counts(hlo.collectives(x.as_text())) for kind, x in programs.items()},
        "temp_bytes": {kind: x.memory_analysis().temp_size_in_bytes for kind, x in programs.items()},
        "buffer_bytes": buffer.num_bytes,
    }


def compiled(one: Contender) -> Contender:
    return dataclasses.replace(one, step=one.step.lower(one.state, one.batch).compile())


def with_bare_collectives(mesh: Mesh, plain: Contender, traffic: dict[str, int]) -> Contender:
    """The plain step and, in the same program, every shard's size known to all, and an all-to-all of the exchange's bytes."""
    size, joined = mesh_lib.shard_rows(mesh, np.ones(mesh.size, np.int32)), joins(plain.state.params)
    rows = traffic["rows_moved"] // mesh.size * mesh.size
    packed = mesh_lib.shard_rows(mesh, np.zeros((rows * mesh.size, traffic["row_bytes"]), np.uint8))
    alone = functools.partial(collectives, joined)
    bare, train = mesh_lib.over_mesh(mesh, alone, (ROWS, ROWS), (ROWS, ROWS)), plain.step

    def step(state: Any, batch: Any) -> Any:
        trained, sent = state
        trained, metrics = train(trained, batch)
        return (trained, bare(*sent)), metrics

    return compiled(Contender(jax.jit(step, donate_argnums=0), (plain.state, (size, packed)), plain.batch))


def collectives(joined: bool, size: jax.Array, packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As a step makes them, see `joins`."""
    total = (mesh_lib.gather_counts(AXIS, size, 1000) if joined else jax.lax.all_gather(size, AXIS)).sum()
    moved = jax.lax.all_to_all(packed + total.astype(jnp.uint8), AXIS, 0, 0, tiled=True)
    return size + total % 2, moved


def alone(sizes: Sizes, buffer: Buffer) -> dict[str, float]:
    """Milliseconds of insert and of draw, each compiled alone."""
    stored, key = full(buffer, sizes.mesh), jax.random.key(0)
    rows = harness.made_up_rows(sizes.mesh, sizes.new * sizes.mesh.size)
    draw, insert = jax.jit(buffer.draw), jax.jit(buffer.insert, donate_argnums=0)
    drawing = Contender(lambda _, __: (draw(stored, key), None), None)
    drawing.run(1)
    draw_ms = drawing.turns(sizes.runs)["median"]
    inserting = Contender(lambda state, _: (insert(state, rows, key), None), stored)
    inserting.run(1)
    return {"insert": inserting.turns(sizes.runs)["median"], "draw_and_exchange": draw_ms}


def measure_host(sizes: Sizes, model: str) -> Json:
    """The device tier and the host tier by each way of handing over, in turn."""
    device = compiled(sizes.contender(model, sizes.buffer()))
    device.run(sizes.steps)
    return {handover: one_handover(sizes, model, device, handover) for handover in HANDOVERS}


def one_handover(sizes: Sizes, model: str, device: Contender, handover: str) -> Json:
    buffer, phases = sizes.buffer(tier="host", handover=handover), Phases({})
    assert buffer.host is not None
    host = sizes.contender(model, buffer)
    with buffer.host.serving(0, host.state.staged) as store:
        host.step = host.step.prepare(host.state, host.batch, phases)
        for _ in range(3):
            host.run(sizes.steps)
        store.seconds.update(dict.fromkeys(store.seconds, 0.0))
        phases.seconds.clear()
        device.seconds.clear()
        harness.in_turn((device, host), sizes.runs, sizes.steps)
        steps = sizes.runs * sizes.steps
        writer = {name: 1e3 * seconds / steps for name, seconds in store.seconds.items()}
        waited = {name: 1e3 * seconds / steps for name, seconds in phases.seconds.items()}
        hidden = hidden_share(host, store, steps)
    return {
        "step_ms": {"host": harness.spread(host.seconds), "device": harness.spread(device.seconds)},
        "over_device": harness.ratio(host, device),
        "phases_ms": waited,
        "writer_ms": writer,
        "hidden": hidden,
    }


def hidden_share(host: Contender, store: Store, steps: int) -> float:
    """Of the seconds the writer works, those in which the step was running; a step is waited for, and then the writer."""
    before, exposed = dict(store.seconds), 0.0
    for _ in range(steps):
        host.state, metrics = host.step(host.state, host.batch)
        jax.block_until_ready(metrics)
        begin = time.perf_counter()
        store.take()
        exposed += time.perf_counter() - begin
    work = sum(store.seconds[name] - before[name] for name in ("populate", "sample", "exchange"))
    return max(0.0, 1 - exposed / work)


def full(buffer: Buffer, mesh: Mesh) -> Any:
    """The state of a buffer into which more rows than it holds have been put."""
    state, rows = buffer.init(), harness.made_up_rows(mesh, 64 * mesh.size)
    times = range(-(-buffer.capacity // (64 * mesh.size)) + 1)
    if buffer.host is None:
        insert = jax.jit(buffer.insert, donate_argnums=0)
        for i in times:
            state = insert(state, rows, jax.random.key(i))
        return state

    def one_turn(shard: Any, rows: Any, key: jax.Array, number: jax.Array) -> Any:
        return buffer.local.turn(shard, rows, key, (), number)

    turn = mesh_lib.on_mesh(mesh, one_turn, (ROWS, ROWS, WHOLE, WHOLE), ROWS)
    with buffer.host.serving(0) as store:
        for i in times:
            state, _, handover = turn(state, rows, jax.random.key(i), np.int32(i))
            store.passed(handover)
    return state


def plot(record: Json) -> Figure:
    """The ratio of each model with its spread, those of control and floor, and the goal."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes, found = figure.add_subplot(), record["models"]
    for i, one in enumerate(found):
        for j, (name, (label, color)) in enumerate(KINDS.items()):
            o, x = one[name], i + 0.2 * (j - 1)
            bars = [[o["median"] - o["p10"]], [o["p90"] - o["median"]]]
            axes.errorbar(x, o["median"], bars, fmt="o", color=color, capsize=4, label=None if i else label)
            axes.annotate(f"{o['median']:.2f}", (x, o["median"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.axhline(1.02, color="0.5", linestyle=":", label="goal, 1.02")
    axes.set_xticks(range(len(found)), [one["model"] for one in found])
    axes.set_xlim(-0.5, len(found) - 0.3)
    axes.set_ylabel("time over that of\na plain step on b + r rows")
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    harness.run(measure, plot)
