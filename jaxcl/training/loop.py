"""The loop around the compiled step: tasks, batches, evaluation, logs, checkpoints."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxcl import checkpoint, data, files
from jaxcl import mesh as mesh_lib
from jaxcl.buffer.host import Fed
from jaxcl.buffer.reshard import reshard
from jaxcl.errors import Diverged
from jaxcl.training import control
from jaxcl.training.experiment import (
    Experiment,
    build,
    capacity_of,
    eval_batches,
    policy_of,
    task_batches,
    train_batches,
)
from jaxcl.training.result import add_scores, count_rows, summarize, times
from jaxcl.training.session import Session, State, diverged, open_session
from jaxcl.training.state import TrainState, initial_state
from jaxcl.training.step import step_keys

S = TypeVar("S", bound=State)


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = True,
    overwrite: bool = False,
    stall_seconds: float | None = None,
) -> dict[str, Any]:
    """Trains over all tasks, evaluating on every task's test rows after each, and leaves a finished run in `workdir`.

    A finished run of the same config is returned as it is; an unfinished one is continued from its last checkpoint, on any
    number of devices and processes. In a run of several processes all call this alike and share `workdir`.

    Args:
      config: see `jaxcl.training.config.default_config`.
      workdir: the run's folder, made if needed.
      devices: to train on; default all.
      progress: whether to draw a progress bar.
      overwrite: remove what an earlier run left in `workdir` instead of continuing it.
      stall_seconds: a process of several ends itself when no step is finished for so long; None: never.

    Returns:
      What result.json holds.

    Raises:
      UserError: one line on what is wrong with config, data or workdir, before anything is compiled.
      Preempted: SIGTERM came; the run is saved and can be continued.
      Diverged: the loss or a parameter is not finite.
      StorageError: the disk is full.
    """
    begin = time.perf_counter()
    run = build(config, devices)
    folder, first = pathlib.Path(workdir), jax.process_index() == 0
    session_options: Any = {"begin": begin, "overwrite": overwrite, "stall_seconds": stall_seconds}
    with (
        files.full_disk_is_a_storage_error(folder),
        open_session(config, folder, run.mesh, **session_options) as session,
    ):
        if isinstance(session, dict):
            return session
        result = _run_tasks(config, run, session, progress and first)
        result |= times(result["images"], session)
        if run.buffer is not None and run.buffer.host is not None:
            result["background_seconds"] = run.buffer.host.seconds  # of the first process's writer in this session
        if first:
            files.write_json(folder / "result.json", result)
    return result


def _run_tasks(config: ConfigDict, run: Experiment, session: Session, progress: bool) -> dict:
    def weights_key(task: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(config.seed), task)

    at, phases = session.progress, session.phases
    tasks, scores = run.scenario.tasks, None
    store = None if run.buffer is None else run.buffer.host
    loaders = [train_batches(config, run, t) for t in range(len(tasks))]
    assert loaders[0] is not None, "the first task has no rows"
    with phases("compile"):
        state = initial_state(run.mesh, run.new_weights(weights_key(0)), run.buffer, run.strategy)
        first = mesh_lib.shard_rows(run.mesh, loaders[0][0])
        step = run.train_step
        if store is None:
            step = step.lower(state, first).compile()  # every later shape but this one is refused: no retrace
    if session.found is not None:
        with phases("restore"):
            state = restore(config, run, session, state)
    if store is not None:
        session.serve(store, int(state.step), state.staged)
        step = Fed(step, store, phases)
        if run.review is not None:
            fed = dataclasses.replace(run.review, step=Fed(run.review.step, store, phases))
            run = dataclasses.replace(run, review=fed)
        with phases("compile"):
            step.compile(state, first)
    to_do = sum(len(x) for x in loaders[at.task + at.rehearsing :] if x) - (0 if at.rehearsing else at.batch)
    with tqdm(
        total=at.step + to_do,
        initial=at.step,
        desc=config.strategy,
        unit="step",
        disable=not progress,
    ) as bar:
        for task, loader in list(zip(tasks, loaders, strict=True))[at.task :]:
            bar.set_description(f"{config.strategy}, task {task.index + 1} of {len(tasks)}")
            if run.strategy.fresh and task.index and at.iterator is None:
                state = renewed(state, run.new_weights(weights_key(task.index)), True)
            if loader is not None and not at.rehearsing:  # without rows the strategy trains nothing in this task
                if config.buffer.replay != "draw":
                    bar.total -= len(loader)
                    loader = train_batches(config, run, task.index, state) or loader
                    bar.total += len(loader)
                if at.iterator is None:
                    state = _begin_task(run.mesh, state, task.index, loader.steps_per_epoch)
                state = train_steps(run.mesh, step, state, loader, config.log_every, session, bar)
                count_rows(config, run, at, state, loader, task.index)
                with phases("end of task"):
                    state = store_exemplars(config, run, session, state, task.index)
            review = run.review if loader is not None else None
            again = None if review is None else review.batches(config, state, task.index)
            if review is not None and again is not None:
                weights = functools.partial(run.new_weights, weights_key(task.index))
                if not at.rehearsing:
                    at.rehearsing, at.iterator = True, None
                    state = renewed(state, weights(), review.renews_weights)
                    state = _begin_task(run.mesh, state, task.index, again.steps_per_epoch)
                bar.total += len(again) - at.batch
                state = train_steps(run.mesh, review.step, state, again, config.log_every, session, bar)
                if not review.renews_weights:
                    at.tuned.append(again.rows_per_epoch)
                    state = renewed(state, weights(), False)
            if loader is not None:
                with phases("end of task"):
                    state = end_task(config, run, session, state, task.index)
            with phases("evaluate"):
                batches = session.watched(eval_batches(config, run), "a batch of the evaluation")
                scores = run.evaluate(state.params, state.batch_stats, state.strategy_state, batches)
            rows = add_scores(at, scores)
            session.log.write("evaluation", at.step, {"task": task.index, **rows})
            session.log.write_seconds(at.step, phases.seconds, {} if store is None else store.seconds)
            so_far = {name: np.mean(row[: task.index + 1]) for name, row in rows.items()}
            bar.set_postfix({name: f"{x:.4f}" if name == "error" else f"{100 * x:.1f} %" for name, x in so_far.items()})
            at.task, at.rehearsing, at.iterator = task.index + 1, False, None
            session.save(state)
            if at.task < len(tasks):
                session.stop_if_asked()
    with phases("save"):
        session.checkpoints.wait()
    with phases("evaluate"):
        if scores is None:  # the run was stopped after its last task
            batches = session.watched(eval_batches(config, run), "a batch of the evaluation")
            scores = run.evaluate(state.params, state.batch_stats, state.strategy_state, batches)
        untrained = _score_untrained(config, run, session, run.new_weights(weights_key(0)))
    return summarize(config, run, at, state, scores, untrained)


def train_steps(
    mesh: jax.sharding.Mesh,
    step: Callable,
    state: S,
    loader: data.Loader,
    log_every: int,
    session: Session,
    bar: tqdm,
) -> S:
    """The steps of one task, or of the rehearsal at its end, that are not done yet. Metrics are fetched a logging interval
    late, so that the devices never wait for them; a checkpoint waits, so that the log it belongs to is complete."""
    pending: tuple[int, int, dict] | None = None
    at, phases = session.progress, session.phases

    def flush() -> None:
        nonlocal pending
        if pending is None:
            return
        (number, index, values), pending = pending, None
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        session.log.write("train", number, {"task": at.task, "epoch": index / loader.steps_per_epoch, **values})
        if not np.isfinite(values.get("loss", 0.0)):
            raise Diverged(diverged(f"the loss is {values['loss']}", number, at.task))

    batches = iter(loader)
    if at.iterator is not None:
        batches.set_state(at.iterator)
    for index in range(at.batch, len(loader)):
        with phases("load"):
            rows = next(batches)
        with phases("assemble"):
            batch = mesh_lib.shard_rows(mesh, rows)
        with phases("train"):
            try:
                state, values = step(state, batch)
            except Exception:
                if session.writer_failed and jax.process_count() == 1:  # else the others have gone on: no common state
                    flush()
                    at.iterator = {"next_index": index}
                    session.save(state)  # of the step before; raises what the writer has met with
                raise
            at.step += 1
            if index % log_every == 0 or index == len(loader) - 1:
                flush()
                pending = (at.step, index, values)
            answer = session.after_step(at.step, values)
        bar.update()
        if answer != control.GO_ON and index + 1 < len(loader):  # a save at the task's end, or rehearsal, follows
            with phases("train"):
                flush()
            at.iterator = batches.get_state()
            session.save(state)
            session.stop_if_asked(answer)
    with phases("train"):
        flush()
        jax.block_until_ready(state)
    return state


def restore(config: ConfigDict, run: Experiment, session: Session, state: TrainState) -> TrainState:
    """The state of the checkpoint, on the devices of this session; `state`, a new one, gives the shapes and is freed."""
    target = checkpoint.abstract(state)
    jax.tree.map(lambda x: x.delete(), state)  # or the memory would have to hold the buffer twice
    old, new = session.progress.devices, run.mesh.size
    assert session.found is not None
    store = None if run.buffer is None else run.buffer.host
    checkpoints, found = session.checkpoints, session.found
    if old == new or run.buffer is None:
        if store is not None:
            store.restore(checkpoints.rows(found, store.payload(), store.row))
        return checkpoints.restore(found, target)
    target = dataclasses.replace(target, staged=())
    state = checkpoints.restore(found, target, reshaped=("buffer.",), ignored=("staged.",))
    assert state.buffer is not None
    stored = state.buffer
    if store is not None:  # the record of a slot is then its number, which tells where the row is to be found
        stored = dataclasses.replace(stored, record=np.arange(len(stored.id)))
    buffer = reshard(
        stored,
        policy=policy_of(config, run.strategy),
        capacity=capacity_of(config.buffer, run.scenario),
        num_classes=run.train.num_classes,
        old=old,
        new=new,
        memory=config.buffer.memory,
    )
    if store is not None:
        store.restore(checkpoints.rows(found, range(old), store.row), np.where(buffer.id >= 0, buffer.record, -1))
        buffer = dataclasses.replace(buffer, record={})
    buffer = mesh_lib.split_rows(run.mesh, buffer)
    # The draws that wait to be replayed are made anew, by the keys of the step that made them.
    keys = step_keys(jax.random.key(config.seed), state.step - 1, run.strategy.draws)[2:]
    return dataclasses.replace(state, buffer=buffer, staged=jax.jit(run.buffer.stage)(buffer, keys))


def store_exemplars(config: ConfigDict, run: Experiment, session: Session, state: TrainState, task: int) -> TrainState:
    """Fills the memory, where that is done at a task's end."""
    if run.store_exemplars is None:
        return state
    batches = functools.partial(session.watched, task_batches(config, run, task), "a batch at a task's end")
    selecting = jax.random.fold_in(jax.random.key(config.seed), np.uint32(2**32 - 1))  # no step has this number
    return run.store_exemplars(state, task, jax.random.fold_in(selecting, task), batches)


def end_task(config: ConfigDict, run: Experiment, session: Session, state: TrainState, task: int) -> TrainState:
    """What the strategy does when all steps of a task are done."""
    batches = functools.partial(session.watched, task_batches(config, run, task), "a batch at a task's end")
    return run.end_task(state, batches)


def _begin_task(mesh: jax.sharding.Mesh, state: TrainState, task: int, steps_per_epoch: int) -> TrainState:
    task_step, per_epoch, number = (mesh_lib.replicate(mesh, np.int32(x)) for x in (0, steps_per_epoch, task))
    return dataclasses.replace(state, task_step=task_step, steps_per_epoch=per_epoch, task=number)


def renewed(state: TrainState, weights: tuple[Any, Any, Any], all_of_them: bool) -> TrainState:
    """The state with these new weights and optimiser, or with the new optimiser alone."""
    params, batch_stats, opt_state = weights
    if not all_of_them:
        return dataclasses.replace(state, opt_state=opt_state)
    return dataclasses.replace(state, params=params, batch_stats=batch_stats, opt_state=opt_state)


def _score_untrained(config: ConfigDict, run: Experiment, session: Session, weights: Any) -> np.ndarray:
    """The accuracy (or error) of newly initialised weights on every task, against which forward transfer is measured."""
    params, batch_stats, _ = weights
    batches = session.watched(eval_batches(config, run), "a batch of the evaluation")
    own = jax.jit(run.strategy.init, out_shardings=mesh_lib.replicated(run.mesh))(params, batch_stats)
    return run.evaluate(params, batch_stats, own, batches)["error" if run.train.targets else "accuracy"]
