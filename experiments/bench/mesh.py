"""What a device holds of a Vision Transformer, and what a step of rehearsal takes, by the shape of the mesh.

    python -m experiments.bench.mesh --json=experiments/results/bench_mesh.json
    python -m experiments.bench.mesh --devices=8 --part=bytes --sizes=L --shapes=8x1x1,1x4x2
    python -m experiments.bench.mesh --devices=8 --part=steps

`bytes` compiles a step of `er` with AdamW for images of 224x224, of abstract arrays, so that nothing has to fit this machine:
weights with moments by the layout, and arguments and temporaries of a device as the compiled program has them. The CPU backend
takes recomputations together again, so its temporaries are an upper bound: a GPU or TPU, which keeps them apart, has less.

`steps` times ViT-Ti on 32x32 images: `er` on b + r rows a device, and a plain step on as many, in turn. Shapes of as many row
shards can be compared with each other; on fake devices, which share the cores, the times of different numbers of them cannot.

Without --part it does both: `bytes` in a process of its own for every number of fake devices.
"""

import dataclasses
import functools
import json
import math
import pathlib
import subprocess
import sys
import tempfile
from typing import Annotated, Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.bench import harness
from experiments.bench.harness import CLASSES, Contender
from experiments.pages.page import ROOT, Json
from jaxcl import data
from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Buffer, make_buffer
from jaxcl.check import refused
from jaxcl.mesh import AXIS, ROWS
from jaxcl.models import make_model
from jaxcl.models.vit import SIZES
from jaxcl.optimizer import make_optimizer
from jaxcl.partition import bytes_on_device, make_layout
from jaxcl.strategies import make_strategy
from jaxcl.training.config import default_config
from jaxcl.training.layout import squares_of
from jaxcl.training.learn import Bound
from jaxcl.training.state import TrainState, initial_state, make_weights, specs
from jaxcl.training.step import make_train_step
from jaxcl.types import Batch, PyTree

SHAPES = {  # by the number of devices; data x fsdp x model
    8: ("8x1x1", "1x8x1", "4x1x2", "2x2x2", "1x4x2", "2x1x4"),
    64: ("64x1x1", "8x8x1", "1x64x1", "8x4x2"),
    256: ("256x1x1", "32x8x1", "32x4x2"),
}
TIMED = ("4x1x1", "2x2x1", "1x4x1", "4x1x2", "2x2x2", "1x4x2")  # four row shards each


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a Vision Transformer on a mesh, not compiled.

    Attributes:
      bound, program: see `make_train_step`.
      side, new, drawn: pixels of an image, b and r of a device's rows.
    """

    bound: Bound
    program: Any
    side: int
    new: int
    drawn: int

    @property
    def rows(self) -> int:
        """New rows of a batch; of a plain step as many as `er` has with its representatives."""
        each = self.new + (self.drawn if self.bound.buffer is None else 0)
        return each * mesh_lib.row_shards(self.bound.mesh)

    def weights(self) -> Any:
        bound = self.bound
        return make_weights(bound.mesh, bound.model, bound.optimizer, (self.side, self.side, 3), layout=bound.layout)


def make_step(
    mesh: jax.sharding.Mesh,
    strategy: str,
    model: ConfigDict,
    *,
    side: int,
    new: int,
    drawn: int,
    capacity: int,
    split_state: bool = False,
) -> Step:
    """The step with AdamW; `model` are options of `vit` with its dtype."""
    options = dict(model)
    network = make_model("vit", CLASSES, options=options, dtype=options.pop("dtype"), axis_name=AXIS)
    rule, config, shape = make_strategy(strategy), default_config().optimizer, (side, side, 3)
    config.name, config.weight_decay = "adamw", 0.05

    def new_arrays() -> PyTree:
        params = network.init(jax.random.key(0), shape)["params"]
        return params, make_optimizer(config).init(params), rule.init(params, {})

    shapes = jax.eval_shape(new_arrays)
    layout = make_layout(mesh, network.rules, *shapes, split_state=split_state, remat=network.remat, model="vit")
    shards = mesh_lib.row_shards(mesh)
    buffer = None
    if rule.draws:
        record = {"image": jax.ShapeDtypeStruct(shape, np.uint8)}
        sizes: Any = {"capacity": capacity * shards, "representatives": drawn * shards, "num_classes": CLASSES}
        buffer = make_buffer(record, policy="class_random", accept=0.25, mesh=mesh, axis=AXIS, **sizes)
    images, classes = (data.make_augment((), shape), data.make_normalize(shape)), np.ones((1, CLASSES), bool)
    optimizer, schedule = make_optimizer(config, squares=squares_of(layout)), optax.constant_schedule(1e-3)
    bound = Bound(mesh, network, rule, buffer, optimizer, schedule, *images, classes, layout=layout)
    return Step(bound, make_train_step(bound, 0), side, new, drawn)


# --- what a device holds ---------------------------------------------------------------------------------------------


def abstract(step: Step) -> tuple[TrainState, Batch]:
    """Shapes of a state and a batch, with their places."""
    bound = step.bound
    mesh, buffer = bound.mesh, bound.buffer
    params, batch_stats, opt_state = jax.eval_shape(step.weights(), jax.random.key(0))
    number: Any = jax.ShapeDtypeStruct((), np.int32)
    state = TrainState(
        *(number,) * 4,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        buffer=None if buffer is None else jax.eval_shape(buffer.init),
        staged=() if buffer is None else (jax.eval_shape(buffer.no_rows),) * bound.strategy.draws,
        strategy_state=jax.eval_shape(bound.strategy.init, params, batch_stats),
    )
    rows = step.rows
    batch = {
        "image": jax.ShapeDtypeStruct((rows, step.side, step.side, 3), np.uint8),
        **{name: jax.ShapeDtypeStruct((rows,), np.int32) for name in ("label", "id")},
        "valid": jax.ShapeDtypeStruct((rows,), np.bool_),
    }

    def placed(spec: PartitionSpec, tree: PyTree) -> PyTree:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    return mesh_lib.of_specs(placed, (specs(bound.layout), ROWS), (state, batch))


def bytes_by_shape(size: str, shape: str, new: int) -> Json:
    """Of one shape; `split_state` where every device would hold all weights."""
    data_, fsdp, model = sizes_of(shape)
    mesh = mesh_lib.make_mesh(data=data_, fsdp=fsdp, model=model)
    options = ConfigDict({"size": size, "patch": 16, "remat": True, "dtype": "bfloat16"})
    found = []
    for split_state in (False, True) if fsdp * model == 1 else (False,):
        sizes: Any = {"side": 224, "new": new, "drawn": new // 8, "capacity": 64}
        step = make_step(mesh, "er", options, split_state=split_state, **sizes)
        state, batch = abstract(step)
        memory = step.program.program.lower(state, batch).compile().memory_analysis()
        layout, held = step.bound.layout, (state.params, state.opt_state)
        whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(held))
        laid = (layout.params, layout.opt_state) if layout else None
        here = bytes_on_device(mesh, laid, held) if laid else whole
        one = {"size": size, "shape": shape, "devices": mesh.size, "split_state": split_state, "rows": new + new // 8}
        one |= {"weights_and_moments": here, "of_all_devices_would_be": whole}
        one |= {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
        found.append(one)
        harness.show(one)
    return {"bytes": found}


def sizes_of(shape: str) -> tuple[int, int, int]:
    """`8x4x2` -> (8, 4, 2).

    Raises:
      UserError: it is no such text.
    """
    parts = shape.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise refused("--shapes", shape, "data x fsdp x model, such as 4x1x2")
    a, b, c = map(int, parts)
    return a, b, c


# --- what a step takes -----------------------------------------------------------------------------------------------


def steps_by_shape(shapes: list[str], new: int, runs: int, steps: int) -> Json:
    """Rehearsal and plain steps of every shape, in turn."""
    options, found = ConfigDict({"size": "Ti", "patch": 4, "heads": 4, "dtype": "float32"}), []
    pairs = [[contender(shape, name, options, new) for name in ("er", "incremental")] for shape in shapes]
    for one in [one for pair in pairs for one in pair]:
        one.run(2)
    harness.in_turn([one for pair in pairs for one in pair], runs, steps)
    for shape, (rehearsal, plain) in zip(shapes, pairs, strict=True):
        ms = {"rehearsal": harness.spread(rehearsal.seconds), "plain": harness.spread(plain.seconds)}
        found.append({"shape": shape, "step_ms": ms, "overhead": harness.ratio(rehearsal, plain)})
        harness.show(found[-1])
    return {"steps": found}


def contender(shape: str, strategy: str, options: ConfigDict, new: int) -> Contender:
    places = sizes_of(shape)
    devices = jax.devices()[: math.prod(places)]
    mesh = mesh_lib.make_mesh(devices, data=places[0], fsdp=places[1], model=places[2])
    step = make_step(mesh, strategy, options, side=32, new=new, drawn=max(1, new // 8), capacity=256)
    bound, weights = step.bound, step.weights()(jax.random.key(0))
    state = initial_state(mesh, weights, bound.buffer, bound.strategy, layout=bound.layout)
    if bound.buffer is not None:
        state = dataclasses.replace(state, buffer=filled(bound.buffer, mesh))
    batch = harness.made_up(mesh, step.rows)
    return Contender(step.program.program.lower(state, batch).compile(), state, batch)


def filled(buffer: Buffer, mesh: jax.sharding.Mesh) -> Any:
    """A state with every row stored."""
    state, rows = buffer.init(), harness.made_up_rows(mesh, 64 * mesh_lib.row_shards(mesh))
    insert = jax.jit(buffer.insert, donate_argnums=0)
    for i in range(-(-buffer.capacity // (64 * mesh_lib.row_shards(mesh))) + 1):
        state = insert(state, rows, jax.random.key(i))
    return state


# --- the command -----------------------------------------------------------------------------------------------------


def measure(
    *,
    part: Annotated[Literal["all", "bytes", "steps"], "what to measure"] = "all",
    sizes: Annotated[tuple[str, ...], "of the transformer, of bytes"] = ("B", "L"),
    shapes: Annotated[tuple[str, ...], "data x fsdp x model; default: several"] = (),
    new: Annotated[int, "b: new rows of a row shard"] = 8,
    runs: Annotated[int, "timed turns of each kind"] = 10,
    steps: Annotated[int, "steps in a turn"] = 2,
) -> Json:
    for size in sizes:
        if size not in SIZES:
            raise refused("--sizes", size, f"one of {', '.join(SIZES)}")
    if part == "bytes":
        chosen = shapes or SHAPES.get(jax.device_count(), (f"{jax.device_count()}x1x1",))
        found = [bytes_by_shape(size, shape, new) for size in sizes for shape in chosen]
        return {"bytes": [one for some in found for one in some["bytes"]]}
    if part == "steps":
        return steps_by_shape(list(shapes or TIMED), new, runs, steps)
    own = functools.partial(in_process, f"--sizes={','.join(sizes)}", f"--new={new}")
    by_count = [own(f"--devices={count}", "--part=bytes") for count in SHAPES]
    timed = own("--devices=8", "--part=steps", f"--runs={runs}", f"--steps={steps}")
    return {"bytes": [one for found in by_count for one in found["bytes"]], "steps": timed["steps"]}


def in_process(*flags: str) -> Json:
    """The record of this command with these flags, which has a number of fake devices of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "found.json"
        line = [sys.executable, "-m", "experiments.bench.mesh", *flags, f"--json={file}"]
        subprocess.run(line, cwd=ROOT, check=True)
        return json.loads(file.read_text())


if __name__ == "__main__":
    harness.run(measure)
