"""What a step and its memory cost, of every kind of negatives; and a bank of three million rows. See memory_bank.py."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.bench import harness
from experiments.bench.harness import Contender
from experiments.bench.peers.protocol import free_bytes
from experiments.pages.page import Json
from jaxcl import mesh as mesh_lib
from jaxcl.contrastive.bank import BankState, make_bank
from jaxcl.contrastive.step import NEGATIVES, ContrastiveState, initial_state, make_step
from jaxcl.contrastive.train import build, bytes_of, train_batches
from jaxcl.data import make_augment
from jaxcl.models import make_towers
from jaxcl.optimizer import make_optimizer

STEPS, TURNS = 20, 7
ROWS, DIM, DRAWN = 3_264_868, 768, 4096  # the image-text set of the notes behind the issue; a common width; K
SHARES = (64, 16, 4, 1)  # of ROWS: the law of growth
BATCH = 256


def measure_modes(config: ConfigDict) -> list[Json]:
    """Milliseconds a step (median of turns in which every kind comes once) and bytes on a device, by kind, on 1 and 8 devices:
    the same batch of pairs over all devices, 7 times as many stored rows or drawn slots."""
    found = []
    for devices in (1, 8):
        contenders: dict[str, Contender] = {}
        sizes: dict[str, dict[str, int]] = {}
        for negatives in NEGATIVES:
            one = config.copy_and_resolve_references()
            one.batch_size = 8 * config.batch_size
            one.negatives, one.bank.capacity, one.bank.drawn = negatives, 7 * one.batch_size, 1024
            run = build(one, jax.devices()[:devices])
            state, batch = run.new_state(), mesh_lib.shard_rows(run.mesh, train_batches(one, run, 0)[0])
            program = run.step.lower(state, batch).compile()
            sizes[negatives] = bytes_of(state) | {"temporaries": program.memory_analysis().temp_size_in_bytes}
            contenders[negatives] = Contender(program, state, batch, blocking=True)
            contenders[negatives].run(STEPS)
        harness.in_turn(list(contenders.values()), TURNS, STEPS)
        for negatives, contender in contenders.items():
            step_ms, size = harness.spread(contender.seconds), sizes[negatives]
            found.append({"devices": devices, "negatives": negatives, "step_ms": step_ms, "bytes_per_device": size})
            harness.show(found[-1])
    return found


def measure_growth() -> list[Json]:
    """A full bank of one side in bfloat16 on all devices, at parts of its size and whole: allocated, filled and stepped.

    The towers are small; what is measured is the bank: its insert, its draw of K negatives and their scores.
    """
    mesh, found = mesh_lib.make_mesh(), []
    for part in SHARES:
        rows = ROWS // part
        need, free = rows * (2 * DIM + 12), free_bytes()
        if free is not None and 1.3 * need > free:
            skipped = f"needs {need / 2**30:.1f} GiB of {free / 2**30:.1f}"
            found.append({"rows": rows, "bytes": need, "skipped": skipped})
            harness.show(found[-1])
            continue
        found.append(one_size(mesh, rows))
        harness.show(found[-1])
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
    before = harness.resident()
    state = new()
    assert state.bank is not None
    # Every page of the bank is touched before anything is timed: what was allocated is then there.
    state = dataclasses.replace(state, bank=jax.jit(written, donate_argnums=0)(state.bank))
    contender = Contender(program, state, given, blocking=True)
    contender.run(2)
    for turn in range(TURNS):
        contender.batch = batch((turn + 1) * BATCH)
        contender.turns(1, 5)
    return {
        "rows": rows,
        "dim": DIM,
        "drawn": DRAWN,
        "batch_size": BATCH,
        "devices": mesh.size,
        "bytes": bank.num_bytes,
        "bytes_per_device": bank.num_bytes // mesh.size,
        "temporaries_per_device": program.memory_analysis().temp_size_in_bytes,
        "resident_growth": harness.resident() - before,
        "step_ms": harness.spread(contender.seconds),
    }


def written(state: BankState) -> BankState:
    """The bank with every row of the right side written."""
    shard = state.shard
    record = {**shard.record, "right": {"value": shard.record["right"]["value"] | jnp.uint16(1)}}
    return BankState(dataclasses.replace(shard, record=record, id=jnp.maximum(shard.id, 0)), state.meta)
