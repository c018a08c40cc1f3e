"""Rehearsal overhead: the time of a step with b new and r drawn rows over a plain step on b + r new rows.

    python -m experiments.bench.step --json=runs/bench_step.json --devices=8 [--models=mlp,resnet18] [--host]

Same model, optimiser and process, the kinds of step in turn, each run of a few steps ended by blocking; the ratio is
taken run by run, so that what else the machine does hits all. The plain step trains on as many rows; it differs in nothing
but insert, draw and exchange. Two more steps say how to read the ratio: a second plain step, compiled and allocated anew
(the control: how far from 1 a ratio of equals comes out), and a plain step with nothing but the bare collectives beside it,
as many bytes as the exchange sends (the floor: no exchange on these devices can cost less). Beside the ratios: images a
second, and the time of insert and draw compiled alone. On a GPU give --dtype=bfloat16 and larger sizes; the goal is a ratio
of 1.02.

With --host also the tier in host memory, by either way of handing rows over: its step time over that of the device tier
(goal 1.05), how long the loop waits, and how much of the writer's work (storing, gathering, starting the transfer) the step
hides: in further runs that wait for every step to end, the share of that work which is done by then.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.sharding import PartitionSpec

from experiments import cli
from experiments.bench.environment import environment
from experiments.bench.timing import Contender, in_turn, quantiles, spread
from jaxcl import data
from jaxcl import mesh as mesh_lib
from jaxcl.buffer import HANDOVERS, Buffer, Rows, make_buffer
from jaxcl.buffer.host import Store
from jaxcl.mesh import AXIS
from jaxcl.models import make_model
from jaxcl.runs.session import Phases
from jaxcl.strategies import make_strategy
from jaxcl.training.state import initial_state, make_weights
from jaxcl.training.step import make_train_step

MODELS = flags.DEFINE_list("models", ["mlp", "convnet", "resnet18"], "models to time")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the computation")
WIDTH = flags.DEFINE_integer("width", 16, "of the convolutional models")
NEW = flags.DEFINE_integer("new", 56, "b: new rows a device, the paper's")
DRAWN = flags.DEFINE_integer("drawn", 7, "r: representatives a device, the paper's")
CAPACITY = flags.DEFINE_integer("capacity", 1000, "rows of the buffer a device")
RUNS = flags.DEFINE_integer("runs", 30, "timed runs of each kind")
HOST = flags.DEFINE_bool("host", False, "also time the tier in host memory")
STEPS = flags.DEFINE_integer("steps", 5, "steps in a run")

CLASSES, SHAPE = 100, (32, 32, 3)


def batch_of(mesh: jax.sharding.Mesh, rows: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 255, (rows, *SHAPE), np.uint8),
        "label": rng.integers(0, CLASSES, rows).astype(np.int32),
        "id": np.arange(rows, dtype=np.int32),
        "valid": np.ones(rows, bool),
    }
    return mesh_lib.shard_rows(mesh, batch)


def full(buffer: Buffer, mesh: jax.sharding.Mesh) -> Any:
    """A buffer whose every slot is filled."""
    state, batch = buffer.init(), batch_of(mesh, 64 * mesh.size)
    rows = Rows({"image": batch["image"]}, batch["label"], batch["id"], batch["valid"])
    times = range(-(-buffer.capacity // (64 * mesh.size)) + 1)
    if buffer.host is None:
        insert = jax.jit(buffer.insert, donate_argnums=0)
        for i in times:
            state = insert(state, rows, jax.random.key(i))
        return state
    split, whole = PartitionSpec(AXIS), PartitionSpec()

    def turn(shard: Any, rows: Rows, key: jax.Array, number: jax.Array) -> Any:
        return buffer.local.turn(shard, rows, key, (), number)

    specs = (split, split, whole, whole)
    mapped = jax.jit(jax.shard_map(turn, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False))
    with buffer.host.serving(0) as store:
        for i in times:
            state, _, handover = mapped(state, rows, jax.random.key(i), np.int32(i))
            store.passed(handover)
    return state


def contender(
    mesh: jax.sharding.Mesh,
    model_name: str,
    strategy_name: str,
    new: int,
    buffer: Buffer | None,
    *,
    compiled: bool = True,
) -> Contender:
    options: dict[str, Any] = {"hidden": (100, 100)} if model_name == "mlp" else {"width": WIDTH.value}
    model = make_model(model_name, CLASSES, options=options, dtype=DTYPE.value, axis_name=AXIS)
    optimizer = optax.trace(0.9)
    strategy = make_strategy(strategy_name)
    step = make_train_step(
        mesh,
        model,
        strategy,
        buffer,
        optimizer,
        optax.constant_schedule(0.01),
        data.make_augment((), SHAPE),
        0,
        np.ones((1, CLASSES), bool),
    )
    weights = make_weights(mesh, model, optimizer, SHAPE)(jax.random.key(0))
    state = initial_state(mesh, weights, buffer, strategy)
    if buffer is not None:
        state = dataclasses.replace(state, buffer=full(buffer, mesh))
    batch = batch_of(mesh, new * mesh.size)
    if buffer is not None and buffer.host is not None:  # to be prepared when the store serves
        return Contender(step, state, batch)
    return Contender(step.program.lower(state, batch).compile() if compiled else step.program, state, batch)


def with_bare_collectives(mesh: jax.sharding.Mesh, plain: Contender, traffic: dict[str, int]) -> Contender:
    """The plain step and, in the same program, an all-gather of a number and an all-to-all of the exchange's bytes."""
    size = mesh_lib.shard_rows(mesh, np.ones(mesh.size, np.int32))
    rows = traffic["rows_moved"] // mesh.size * mesh.size
    packed = mesh_lib.shard_rows(mesh, np.zeros((rows * mesh.size, traffic["row_bytes"]), np.uint8))

    def collectives(size: jax.Array, packed: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = jax.lax.all_gather(size, AXIS).sum()
        moved = jax.lax.all_to_all(packed + total.astype(jnp.uint8), AXIS, 0, 0, tiled=True)
        return size + total % 2, moved

    split = PartitionSpec(AXIS)
    bare = jax.shard_map(collectives, mesh=mesh, in_specs=(split, split), out_specs=(split, split), check_vma=False)

    def step(state: Any, batch: Any) -> Any:
        trained, sent = state
        trained, metrics = plain.step(trained, batch)
        return (trained, bare(*sent)), metrics

    state = (plain.state, (size, packed))
    compiled = jax.jit(step, donate_argnums=0).lower(state, plain.batch).compile()
    return Contender(compiled, state, plain.batch)


def median_of(function: Callable[[], Any], runs: int) -> float:
    jax.block_until_ready(function())
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


def buffer_on(mesh: jax.sharding.Mesh, **options: Any) -> Buffer:
    return make_buffer(
        {"image": jax.ShapeDtypeStruct(SHAPE, np.uint8)},
        capacity=CAPACITY.value * mesh.size,
        representatives=DRAWN.value * mesh.size,
        policy="class_random",
        num_classes=CLASSES,
        accept=0.25,
        mesh=mesh,
        **options,
    )


def measure_host(mesh: jax.sharding.Mesh, model: str) -> dict[str, Any]:
    """One model: the device tier and the host tier by each way of handing over, in turn."""
    device = contender(mesh, model, "er", NEW.value, buffer_on(mesh))
    device.run(STEPS.value)
    found: dict[str, Any] = {}
    for handover in HANDOVERS:
        buffer, phases = buffer_on(mesh, tier="host", handover=handover), Phases({})
        assert buffer.host is not None
        host = contender(mesh, model, "er", NEW.value, buffer)
        with contextlib.ExitStack() as stack:
            store = stack.enter_context(buffer.host.serving(0, host.state.staged))
            host.step = host.step.prepare(host.state, host.batch, phases)
            for _ in range(3):
                host.run(STEPS.value)
            store.seconds.update(dict.fromkeys(store.seconds, 0.0))
            phases.seconds.clear()
            device.seconds.clear()
            in_turn((device, host), RUNS.value, STEPS.value)
            steps = RUNS.value * STEPS.value
            writer = {name: 1e3 * seconds / steps for name, seconds in store.seconds.items()}
            hidden = hidden_share(host, store, steps)
        ratio = np.array(host.seconds) / np.array(device.seconds)
        found[handover] = {
            "step_ms": {"host": spread(host.seconds), "device": spread(device.seconds)},
            "over_device": {"median": float(np.median(ratio)), **quantiles(ratio)},
            "phases_ms": {name: 1e3 * seconds / steps for name, seconds in phases.seconds.items()},
            "writer_ms": writer,
            "hidden": hidden,
        }
    return found


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


def measure(mesh: jax.sharding.Mesh, model: str) -> dict[str, Any]:
    """One model: the contenders in turn."""
    b, r, n = NEW.value, DRAWN.value, mesh.size
    buffer = buffer_on(mesh)
    plain, control = (contender(mesh, model, "incremental", b + r, None) for _ in range(2))
    rehearsal = contender(mesh, model, "er", b, buffer)
    uncompiled = contender(mesh, model, "incremental", b + r, None, compiled=False)
    floor = with_bare_collectives(mesh, uncompiled, buffer.traffic)
    contenders = [plain, rehearsal, control, floor]
    for one in contenders:
        one.run(STEPS.value)
    in_turn(contenders, RUNS.value, STEPS.value)

    def over_plain(one: Contender) -> dict[str, float]:
        ratio = np.array(one.seconds) / np.array(plain.seconds)
        return {"median": float(np.median(ratio)), **quantiles(ratio)}

    stored, batch = full(buffer, mesh), batch_of(mesh, b * n)
    draw, key = jax.jit(buffer.draw), jax.random.key(0)
    insert = jax.jit(buffer.insert, donate_argnums=0)
    rows = Rows({"image": batch["image"]}, batch["label"], batch["id"], batch["valid"])
    draw_seconds = median_of(lambda: draw(stored, key), RUNS.value)
    holder = [stored]

    def put() -> Any:
        holder[0] = insert(holder[0], rows, key)
        return holder[0].id

    insert_seconds = median_of(put, RUNS.value)
    memory = rehearsal.step.memory_analysis()
    return {
        "model": model,
        "dtype": DTYPE.value,
        "new": b,
        "drawn": r,
        "step_ms": {"rehearsal": spread(rehearsal.seconds), "plain": spread(plain.seconds)},
        "overhead": over_plain(rehearsal),
        "control": over_plain(control),
        "floor": over_plain(floor),
        "images_per_second": {
            "rehearsal": float((b + r) * n / np.median(rehearsal.seconds)),
            "plain": float((b + r) * n / np.median(plain.seconds)),
        },
        "alone_ms": {"insert": 1e3 * insert_seconds, "draw_and_exchange": 1e3 * draw_seconds},
        "temp_bytes": {
            "rehearsal": memory.temp_size_in_bytes,
            "plain": plain.step.memory_analysis().temp_size_in_bytes,
        },
        "buffer_bytes": buffer.num_bytes,
        "host": measure_host(mesh, model) if HOST.value else {},
    }


def plot(found: list[dict[str, Any]], path: pathlib.Path) -> None:
    """The ratio of each model with its spread, those of control and floor, and the goal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    kinds = {
        "overhead": ("rehearsal", "#0072B2"),
        "floor": ("bare collectives", "#D55E00"),
        "control": ("plain again", "0.5"),
    }
    for i, one in enumerate(found):
        for j, (name, (label, color)) in enumerate(kinds.items()):
            o, x = one[name], i + 0.2 * (j - 1)
            bars = [[o["median"] - o["p10"]], [o["p90"] - o["median"]]]
            axes.errorbar(x, o["median"], bars, fmt="o", color=color, capsize=4, label=None if i else label)
            axes.annotate(f"{o['median']:.2f}", (x, o["median"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.axhline(1.02, color="0.5", linestyle=":", label="goal, 1.02")
    axes.set_xticks(range(len(found)), [one["model"] for one in found])
    axes.set_xlim(-0.5, len(found) - 0.3)
    axes.set_ylabel("time over that of\na plain step on b + r rows")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    mesh = mesh_lib.make_mesh()
    found = []
    for model in MODELS.value:
        one = measure(mesh, model)
        found.append(one)
        print(
            f"{model}: {one['step_ms']['rehearsal']['median']:.2f} ms with rehearsal,"
            f" {one['step_ms']['plain']['median']:.2f} ms plain, ratio {one['overhead']['median']:.3f}"
            f" ({one['overhead']['p10']:.3f}..{one['overhead']['p90']:.3f}); control {one['control']['median']:.3f},"
            f" bare collectives {one['floor']['median']:.3f}; alone: insert {one['alone_ms']['insert']:.2f} ms,"
            f" draw and exchange {one['alone_ms']['draw_and_exchange']:.2f} ms",
            flush=True,
        )
        for handover, host in one["host"].items():
            print(
                f"{model}, host tier by {handover}: {host['step_ms']['host']['median']:.2f} ms,"
                f" {host['over_device']['median']:.3f} of the device tier"
                f" ({host['over_device']['p10']:.3f}..{host['over_device']['p90']:.3f}); waiting"
                f" {host['phases_ms']['wait']:.2f} ms; hidden {100 * host['hidden']:.0f} % of the writer's work",
                flush=True,
            )
    if cli.JSON.value:
        path = pathlib.Path(cli.JSON.value)
        path.write_text(json.dumps({"models": found, **environment()}, indent=1) + "\n")
        plot(found, path.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
