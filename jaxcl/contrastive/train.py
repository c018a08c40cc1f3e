"""A contrastive run: its parts from the config, its rounds of training and evaluation, what it leaves.

The session, the log, the checkpoints and the stepping are those of `jaxcl.runs`.
"""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcl import data
from jaxcl import mesh as mesh_lib
from jaxcl.check import refused
from jaxcl.contrastive.bank import make_bank
from jaxcl.contrastive.config import BANKED, check_config
from jaxcl.contrastive.evaluate import Embed, make_embed, make_staleness, retrieval
from jaxcl.contrastive.step import WITH_KEYS, ContrastiveState, initial_state, make_step
from jaxcl.data.pairs import open_pairs
from jaxcl.errors import UserError
from jaxcl.models import make_towers
from jaxcl.optimizer import make_optimizer, make_schedule
from jaxcl.runs import checkpoint
from jaxcl.runs.frame import conditions, in_sessions
from jaxcl.runs.lanes import Lanes
from jaxcl.runs.progress import Shown, shown, title
from jaxcl.runs.session import Session
from jaxcl.runs.steps import reading, take_steps
from jaxcl.training import sizes


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run, built and checked; nothing is compiled yet. See `initial_state`, `make_step`, `make_embed` and
    `make_staleness`."""

    mesh: jax.sharding.Mesh
    train: data.Source
    test: data.Source
    new_state: Callable[[], ContrastiveState]
    step: Any
    embed: Embed
    staleness: Callable[..., dict[str, list[float]]]


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Parts:
    """Puts a run together from its config.

    Raises:
      UserError: one line on what is wrong with the config or its data.
    """
    mesh = mesh_lib.make_mesh(devices)
    check_config(config, mesh.size)
    if config.batch_size % jax.process_count():
        raise UserError(f"batch_size: {config.batch_size} is not a multiple of {jax.process_count()} processes")
    d, m = config.data, config.model
    options = {x: d[x] for x in ("data_dir", "image_size", "held_out", "split_seed", "length", "vocabulary")}
    train, test = open_pairs(d.source, d.pairs, **options)
    drawn = config.bank.drawn if config.negatives == "full_bank" else 0
    if drawn > len(train):
        raise UserError(f"bank.drawn: {drawn} rows of a bank of {len(train)}, give at most that, or 0 for all")
    for split in (train, test):
        if not len(split):
            raise refused("data.held_out", d.held_out, "a share that leaves a pair to train on, and one to test")
    sizes.check_steps("epochs", config.epochs, [len(train)], config.batch_size)
    augment = data.make_augment(d.augment, train.image_shape, mean=d.mean, std=d.std)
    plain = data.make_augment((), train.image_shape, mean=d.mean, std=d.std)
    towers = make_towers(config.dim, m.image_width, m.text_width, d.vocabulary, m.dtype)
    bank = None
    if config.negatives in BANKED:  # of "full_bank" a slot for every row
        kind, capacity = ("slots", len(train)) if config.negatives == "full_bank" else ("fifo", config.bank.capacity)
        kept = {"storage": config.bank.storage, "chunk": config.bank.chunk}
        bank = make_bank(kind, capacity=capacity, dim=config.dim, mesh=mesh, drawn=drawn, **kept)
    optimizer = make_optimizer(config.optimizer)
    shapes: dict[str, tuple[int, ...]] = {"image": train.image_shape}
    if d.pairs == "captions":
        shapes["text"] = (d.length,)

    start = {name: config[name] for name in ("seed", "temperature", "batch_size")}
    start["momentum"] = config.negatives in WITH_KEYS
    new_state = functools.partial(initial_state, mesh, towers, optimizer, bank, shapes, **start)
    state, row = jax.eval_shape(new_state), 2 * sizes.PIXEL * math.prod(train.image_shape)
    held = {
        "batch_size": (config.batch_size, config.batch_size // mesh.size * row),
        "eval.batch_size": (config.eval.batch_size, config.eval.batch_size // mesh.size * row),
        "model": ({"dim": config.dim, **m.to_dict()}, sizes.bytes_of((state.params, state.opt_state, state.keys))),
        "bank.capacity": (config.bank.capacity, sizes.bytes_of(state.bank) // mesh.size),
    }
    sizes.check_on_devices(held, mesh)
    step = make_step(
        mesh,
        towers,
        bank,
        optimizer,
        make_schedule(config.optimizer, config.epochs),
        augment,
        negatives=config.negatives,
        pairs=d.pairs,
        steps_per_epoch=-(-len(train) // config.batch_size),
        passes=config.passes,
        same_side=config.same_side,
        proximal=config.bank.proximal,
        bank_start=config.bank.start,
        momentum=config.momentum,
    )
    embed = make_embed(mesh, towers, d.pairs, augment if d.pairs == "views" else plain)
    return Parts(mesh, train, test, new_state, step, embed, make_staleness(mesh, config.eval.staleness_rows))


def train_batches(config: ConfigDict, parts: Parts, number: int) -> data.Loader:
    """The batches of round `number` of `eval.rounds`, between two evaluations."""
    return data.train_batches(
        parts.train,
        np.arange(len(parts.train)),
        batch_size=config.batch_size,
        epochs=config.epochs // config.eval.rounds,
        seed=(config.seed, number),
        **reading(config.data.threads, config.data.workers),
    )


def rows_of(config: ConfigDict, source: data.Source, rows: np.ndarray) -> data.Loader:
    """These rows once, in this order."""
    return data.eval_batches(
        source, rows, batch_size=config.eval.batch_size, **reading(config.data.threads, config.data.workers)
    )


def evaluate(config: ConfigDict, parts: Parts, state: ContrastiveState) -> dict[str, Any]:
    """Retrieval on the test pairs, and of a bank the staleness of its rows, against the encoders that fill it."""
    test = rows_of(config, parts.test, np.arange(len(parts.test)))
    scores: dict[str, Any] = retrieval(parts.embed(state.params["towers"], test))
    if state.bank is not None:
        makers = state.keys or state.params["towers"]
        fresh = lambda ids: parts.embed(makers, rows_of(config, parts.train, ids))  # noqa: E731
        scores["staleness"] = parts.staleness(state.bank, int(state.step), fresh)
    return scores


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    progress: Shown = True,
    overwrite: bool = False,
    start_seconds: float | None = None,
    stall_seconds: float | None = None,
) -> dict[str, Any]:
    """Trains on pairs, evaluating `eval.rounds` times, and leaves a finished run in `workdir`.

    Finished and unfinished runs, arguments and errors are those of `jaxcl.training.loop.train_and_evaluate`; a run may be
    continued on any number of devices.

    Returns:
      What result.json holds: the scores of every evaluation, bytes, times.
    """
    begin = time.perf_counter()
    parts = build(config, devices)

    def carry_out(sessions: Sequence[Session]) -> list[dict[str, Any]]:
        lanes: Lanes[ContrastiveState] = Lanes(parts.mesh, [config], sessions)
        return [run_rounds(config, parts, lanes, progress)]

    options: Any = {"begin": begin, "overwrite": overwrite}
    options |= {"start_seconds": start_seconds, "stall_seconds": stall_seconds}
    return in_sessions([config], [pathlib.Path(workdir)], parts.mesh, carry_out, **options)[0]


def run_rounds(config: ConfigDict, parts: Parts, lanes: Lanes[ContrastiveState], progress: Shown) -> dict[str, Any]:
    """Trains and evaluates in the rounds that are not done yet; what result.json holds but for its times."""
    [session] = lanes.sessions
    at, phases = lanes.at, lanes.phases
    loaders = [train_batches(config, parts, number) for number in range(config.eval.rounds)]
    with phases("compile"):
        state = parts.new_state()
        sizes = bytes_of(state)
        step = parts.step.lower(state, lanes.batch([loaders[0][0]])).compile()
        sizes["temporaries"] = step.memory_analysis().temp_size_in_bytes
    if session.found is not None:
        with phases("restore"):
            target = checkpoint.abstract(state)
            jax.tree.map(lambda x: x.delete(), state)
            state = session.checkpoints.restore(session.found, target)
    steps, name = sum(map(len, loaders)), title(progress, config.negatives, [config])
    with shown(name, steps, at.step, bool(progress) and jax.process_index() == 0) as bar:
        for number in range(at.task, config.eval.rounds):
            bar.begin(f"round {number + 1} of {config.eval.rounds}")
            state = take_steps(lanes, step, state, [loaders[number]], bar)
            with phases("evaluate"):
                scores = evaluate(config, parts, state)
            session.log.write("evaluation", at.step, scores)
            at.evaluations.append({"step": at.step, **scores})
            found = {name: f"{100 * scores[name]:.1f} %" for name in ("left_to_right@5", "right_to_left@5")}
            bar.end(f"round {number + 1} of {config.eval.rounds}", found)
            at.counts["images"] = (number + 1) * (config.epochs // config.eval.rounds) * len(parts.train)
            lanes.stand(task=number + 1, iterator=None)
            session.save(state)
            if at.task < config.eval.rounds:
                session.stop_if_asked()
    with phases("save"):
        session.checkpoints.wait()
    return {
        "name": config.name,
        "negatives": config.negatives,
        "seed": config.seed,
        "steps": at.step,
        "images": at.counts["images"],
        "pairs": {"train": len(parts.train), "test": len(parts.test)},
        "bytes_per_device": sizes,
        "evaluations": at.evaluations,
        **conditions(config, parts.mesh),
    }


def bytes_of(state: ContrastiveState) -> dict[str, int]:
    """What a device holds between steps, in bytes."""

    def here(tree: Any) -> int:
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    return {
        "parameters": here(state.params),
        "optimiser": here(state.opt_state),
        "key_encoders": here(state.keys),
        "bank": here((state.bank, state.pending)),
    }
