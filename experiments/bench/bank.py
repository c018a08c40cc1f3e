"""What a step and its memory cost, of every kind of negatives; and a bank of three million rows. See memory_bank.py."""

import dataclasses
import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxcl import mesh as mesh_lib
from jaxcl.contrastive.bank import BankState, make_bank
from jaxcl.contrastive.step import NEGATIVES, ContrastiveState, initial_state, make_step
from jaxcl.contrastive.train import build, bytes_of, train_batches
from jaxcl.data import make_augment
from jaxcl.models import make_towers
from jaxcl.training.optimizer import make_optimizer

Json = dict[str, Any]
STEPS, TURNS = 20, 7
ROWS, DIM, DRAWN = 3_264_868, 768, 4096  # the image-text set of the notes behind the issue; a common width; K
SHARES = (64, 16, 4, 1)  # of ROWS: the law of growth
BATCH = 256


def measure_modes(config: ConfigDict) -> list[Json]:
    """Milliseconds a step (median of turns in which every kind comes once) and bytes on a device, by kind, on 1 and 8 devices:
    the same batch of pairs over all devices, 7 times as many stored rows or drawn slots."""
    found = []
    for devices in (1, 8):
        steppers = {}
        for negatives in NEGATIVES:
            one = config.copy_and_resolve_references()
            one.batch_size = 8 * config.batch_size
            one.negatives, one.bank.capacity, one.bank.drawn = negatives, 7 * one.batch_size, 1024
            run = build(one, jax.devices()[:devices])
            state, batch = run.new_state(), mesh_lib.shard_rows(run.mesh, train_batches(one, run, 0)[0])
            program = run.step.lower(state, batch).compile()
            sizes = bytes_of(state) | {"temporaries": program.memory_analysis().temp_size_in_bytes}
            steppers[negatives] = [program, state, batch, sizes, []]
        for _ in range(TURNS + 1):  # the first warms up
            for stepper in steppers.values():
                stepper[1], seconds = timed(stepper[0], stepper[1], stepper[2], STEPS)
                stepper[4].append(seconds)
        for negatives, (_, _, _, sizes, seconds) in steppers.items():
            ms = sorted(1000 * x for x in seconds[1:])
            spread = {"median": statistics.median(ms), "p10": ms[0], "p90": ms[-1]}
            found.append({"devices": devices, "negatives": negatives, "step_ms": spread, "bytes_per_device": sizes})
            print(f"cost: {devices} devices, {negatives}: {spread['median']:.2f} ms, {sizes}", flush=True)
    return found


def timed(program: Any, state: Any, batch: Any, steps: int) -> tuple[Any, float]:
    """The state after `steps` steps, and the seconds of one."""
    begin = time.perf_counter()
    for _ in range(steps):
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics)
    return state, (time.perf_counter() - begin) / steps


def measure_growth() -> list[Json]:
    """A full bank of one side in bfloat16 on all devices, at parts of its size and whole: allocated, filled and stepped.

    The towers are small; what is measured is the bank: its insert, its draw of K negatives and their scores.
    """
    mesh, found = mesh_lib.make_mesh(), []
    for part in SHARES:
        rows = ROWS // part
        need, free = rows * (2 * DIM + 12), free_memory()
        if 1.3 * need > free:
            found.append(
                {"rows": rows, "bytes": need, "skipped": f"needs {need / 2**30:.1f} GiB of {free / 2**30:.1f}"}
            )
            print(f"scale: {rows:,} rows skipped: {found[-1]['skipped']} GiB free", flush=True)
            continue
        found.append(one_size(mesh, rows))
        print(f"scale: {found[-1]}", flush=True)
    return found


def one_size(mesh: jax.sharding.Mesh, rows: int) -> Json:
    shape, length = (8, 8, 1), 8
    config = ConfigDict({"name": "sgd", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "clip_norm": None})
    towers, optimizer = make_towers(DIM, 4, 8, 64), make_optimizer(config)
    bank = make_bank("slots", capacity=rows, dim=DIM, mesh=mesh, drawn=DRAWN, storage="bfloat16", sides=("right",))
    shapes = {"image": shape, "text": (length,)}
    options: Any = {"seed": 0, "temperature": 0.07, "batch_size": BATCH, "momentum": False}
    augment = make_augment((), shape)
    step = make_step(mesh, towers, bank, optimizer, lambda epoch: jnp.float32(0.01), augment, negatives="full_bank")

    def new() -> ContrastiveState:
        return jax.block_until_ready(initial_state(mesh, towers, optimizer, bank, shapes, **options))

    rng = np.random.default_rng(0)

    def batch(start: int) -> Any:
        ids = ((start + np.arange(BATCH)) % rows).astype(np.int32)
        images, text = rng.integers(0, 256, (BATCH, *shape), np.uint8), rng.integers(1, 64, (BATCH, length), np.int32)
        given = {"image": images, "label": ids, "id": ids, "valid": np.ones(BATCH, bool), "target": {"text": text}}
        return mesh_lib.shard_rows(mesh, given)

    given = batch(1)
    program = step.lower(new(), given).compile()
    before = resident()
    state = new()
    assert state.bank is not None
    # Every page of the bank is touched before anything is timed: what was allocated is then there.
    state = dataclasses.replace(state, bank=jax.jit(written, donate_argnums=0)(state.bank))
    steps = []
    state, _ = timed(program, state, given, 2)
    for turn in range(TURNS):
        state, seconds = timed(program, state, batch((turn + 1) * BATCH), 5)
        steps.append(1000 * seconds)
    steps.sort()
    return {
        "rows": rows,
        "dim": DIM,
        "drawn": DRAWN,
        "batch_size": BATCH,
        "devices": mesh.size,
        "bytes": bank.num_bytes,
        "bytes_per_device": bank.num_bytes // mesh.size,
        "temporaries_per_device": program.memory_analysis().temp_size_in_bytes,
        "resident_growth": resident() - before,
        "step_ms": {"median": statistics.median(steps), "p10": steps[0], "p90": steps[-1]},
    }


def written(state: BankState) -> BankState:
    """The bank with every row of the right side written."""
    shard = state.shard
    record = {**shard.record, "right": {"value": shard.record["right"]["value"] | jnp.uint16(1)}}
    return BankState(dataclasses.replace(shard, record=record, id=jnp.maximum(shard.id, 0)), state.meta)


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> int:
    """Bytes that the machine can give (Linux)."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024
