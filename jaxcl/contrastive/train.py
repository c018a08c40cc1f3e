"""A contrastive run: its parts from the config, its rounds of training and evaluation, what it leaves.

The session, the log, the checkpoints and the stepping are those of `jaxcl.training`.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxcl import data
from jaxcl import mesh as mesh_lib
from jaxcl.contrastive.bank import Bank, make_bank
from jaxcl.contrastive.config import BANKED, check_config
from jaxcl.contrastive.evaluate import Embed, make_embed, make_staleness, retrieval
from jaxcl.contrastive.step import ContrastiveState, initial_state, make_step
from jaxcl.data.pairs import open_pairs
from jaxcl.errors import UserError
from jaxcl.models.towers import make_towers
from jaxcl.runs import checkpoint
from jaxcl.runs.lanes import Lanes
from jaxcl.runs.session import Session
from jaxcl.training.loop import train_steps
from jaxcl.training.optimizer import make_optimizer, make_schedule
from jaxcl.training.result import conditions, record


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """The parts of a run, built and checked; nothing is compiled yet.

    Attributes:
      new_state: `() -> ContrastiveState`.
      step: jitted, see `make_step`.
      staleness: see `make_staleness`.
    """

    mesh: jax.sharding.Mesh
    train: data.Source
    test: data.Source
    bank: Bank | None
    new_state: Callable[[], ContrastiveState]
    step: Any
    embed: Embed
    staleness: Callable[..., dict[str, list[float]]]


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Contrastive:
    """Puts a run together from its config.

    Raises:
      UserError: one line on what is wrong with the config or its data.
    """
    mesh = mesh_lib.make_mesh(devices)
    check_config(config, mesh.size)
    if config.batch_size % jax.process_count():
        raise UserError(f"batch_size: {config.batch_size} is not a multiple of {jax.process_count()} processes")
    d, m = config.data, config.model
    train, test = open_pairs(
        d.source,
        d.pairs,
        data_dir=d.data_dir,
        image_size=d.image_size,
        held_out=d.held_out,
        split_seed=d.split_seed,
        length=d.length,
        vocabulary=d.vocabulary,
    )
    if config.bank.drawn > len(train) and config.negatives == "full_bank":
        raise UserError(
            f"bank.drawn: {config.bank.drawn} rows of a bank of {len(train)}, give at most that, or 0 for all"
        )
    augment = data.make_augment(d.augment, train.image_shape, mean=d.mean, std=d.std)
    plain = data.make_augment((), train.image_shape, mean=d.mean, std=d.std)
    towers = make_towers(config.dim, m.image_width, m.text_width, d.vocabulary, m.dtype)
    bank = None
    if config.negatives in BANKED:
        full = config.negatives == "full_bank"
        bank = make_bank(
            "slots" if full else "fifo",
            capacity=len(train) if full else config.bank.capacity,
            dim=config.dim,
            mesh=mesh,
            drawn=config.bank.drawn if full else 0,
            storage=config.bank.storage,
            chunk=config.bank.chunk,
        )
    optimizer = make_optimizer(config.optimizer)
    shapes: dict[str, tuple[int, ...]] = {"image": train.image_shape}
    if d.pairs == "captions":
        shapes["text"] = (d.length,)

    def new_state() -> ContrastiveState:
        return initial_state(
            mesh,
            towers,
            optimizer,
            bank,
            shapes,
            seed=config.seed,
            temperature=config.temperature,
            batch_size=config.batch_size,
            momentum=config.negatives == "momentum",
        )

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
    return Contrastive(
        mesh, train, test, bank, new_state, step, embed, make_staleness(mesh, config.eval.staleness_rows)
    )


def train_batches(config: ConfigDict, run: Contrastive, part: int) -> data.Loader:
    """The batches of one of the `eval.rounds` parts of the training."""
    return data.train_batches(
        run.train,
        np.arange(len(run.train)),
        batch_size=config.batch_size,
        epochs=config.epochs // config.eval.rounds,
        seed=(config.seed, part),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.threads,
    )


def rows_of(config: ConfigDict, source: data.Source, rows: np.ndarray) -> data.Loader:
    """These rows once, in this order."""
    return data.eval_batches(
        source,
        rows,
        batch_size=config.eval.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.threads,
    )


def evaluate(config: ConfigDict, run: Contrastive, state: ContrastiveState) -> dict[str, Any]:
    """Retrieval on the test pairs, and of a bank the staleness of its rows, against the encoders that fill it."""
    scores: dict[str, Any] = retrieval(
        run.embed(state.params["towers"], rows_of(config, run.test, np.arange(len(run.test))))
    )
    if state.bank is not None:
        makers = state.keys or state.params["towers"]
        fresh = lambda ids: run.embed(makers, rows_of(config, run.train, ids))  # noqa: E731
        scores["staleness"] = run.staleness(state.bank, int(state.step), fresh)
    return scores


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = True,
    overwrite: bool = False,
    stall_seconds: float | None = None,
) -> dict[str, Any]:
    """Trains on pairs, evaluating `eval.rounds` times, and leaves a finished run in `workdir`.

    Finished and unfinished runs, arguments and errors are those of `jaxcl.training.loop.train_and_evaluate`; a run may be
    continued on any number of devices.

    Returns:
      What result.json holds: the scores of every evaluation, bytes, times.
    """
    begin = time.perf_counter()
    run = build(config, devices)

    def train(sessions: Sequence[Session]) -> list[dict[str, Any]]:
        lanes: Lanes[ContrastiveState] = Lanes(run.mesh, [config], sessions)
        return [_run_rounds(config, run, lanes, progress and jax.process_index() == 0)]

    options: Any = {"begin": begin, "overwrite": overwrite, "stall_seconds": stall_seconds}
    return record([config], [pathlib.Path(workdir)], run.mesh, train, **options)[0]


def _run_rounds(config: ConfigDict, run: Contrastive, lanes: Lanes[ContrastiveState], progress: bool) -> dict[str, Any]:
    [session] = lanes.sessions
    at, phases = lanes.at, lanes.phases
    loaders = [train_batches(config, run, part) for part in range(config.eval.rounds)]
    with phases("compile"):
        state = run.new_state()
        sizes = bytes_of(state)
        step = run.step.lower(state, lanes.batch([loaders[0][0]])).compile()
        sizes["temporaries"] = step.memory_analysis().temp_size_in_bytes
    if session.found is not None:
        with phases("restore"):
            target = checkpoint.abstract(state)
            jax.tree.map(lambda x: x.delete(), state)
            state = session.checkpoints.restore(session.found, target)
    steps = sum(map(len, loaders))
    with tqdm(total=steps, initial=at.step, desc=config.negatives, unit="step", disable=not progress) as bar:
        for part in range(at.task, config.eval.rounds):
            state = train_steps(lanes, step, state, [loaders[part]], bar)
            with phases("evaluate"):
                scores = evaluate(config, run, state)
            session.log.write("evaluation", at.step, scores)
            at.evaluations.append({"step": at.step, **scores})
            bar.set_postfix({name: f"{100 * scores[name]:.1f} %" for name in ("left_to_right@5", "right_to_left@5")})
            at.counts["images"] = (part + 1) * (config.epochs // config.eval.rounds) * len(run.train)
            lanes.stand(task=part + 1, iterator=None)
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
        "pairs": {"train": len(run.train), "test": len(run.test)},
        "bytes_per_device": sizes,
        "evaluations": at.evaluations,
        **conditions(config, run.mesh),
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
