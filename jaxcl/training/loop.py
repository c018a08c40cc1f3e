"""The loop around the compiled step: tasks, batches, evaluation, logs, checkpoints; of one seed, or of several as one."""

import dataclasses
import functools
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
from jaxcl.buffer.host import Fed
from jaxcl.buffer.reshard import reshard
from jaxcl.errors import Diverged, UserError
from jaxcl.runs import checkpoint, control
from jaxcl.runs.lanes import Lanes, S, Together
from jaxcl.runs.session import Session, diverged
from jaxcl.training.build import (
    Experiment,
    build,
    capacity_of,
    eval_batches,
    policy_of,
    task_batches,
    train_batches,
)
from jaxcl.training.result import add_scores, count_rows, record, summarize
from jaxcl.training.state import TrainState, initial_state
from jaxcl.training.step import step_keys


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
    options: Any = {"begin": begin, "progress": progress, "overwrite": overwrite, "stall_seconds": stall_seconds}
    return train_lanes([config], [pathlib.Path(workdir)], run, **options)[0]


def train_lanes(
    configs: Sequence[ConfigDict], folders: Sequence[pathlib.Path], run: Experiment, *, progress: bool, **options: Any
) -> list[dict[str, Any]]:
    """The runs of these configs, which differ in their seed alone, side by side in one program.

    Args:
      run: built for these seeds.
      progress: whether to draw a progress bar.
      options: see `record`.

    Returns, raises: see `train_and_evaluate`.
    """
    make_lanes: type[Lanes[TrainState]] = Lanes if len(configs) == 1 else Together

    def train(sessions: Sequence[Session]) -> list[dict[str, Any]]:
        return _run_tasks(make_lanes(run.mesh, configs, sessions), run, progress and jax.process_index() == 0)

    return record(configs, folders, run.mesh, train, **options)


@dataclasses.dataclass(frozen=True)
class Course:
    """What the tasks of a run consist of, for all lanes."""

    lanes: Lanes[TrainState]
    run: Experiment

    def start(self) -> TrainState:
        """The state of a new run, or the one saved last."""
        lanes, run = self.lanes, self.run
        with lanes.phases("compile"):
            states = [initial_state(run.mesh, self._weights(c, 0), run.buffer, run.strategy) for c in lanes.configs]
        if lanes.sessions[0].found is not None:
            with lanes.phases("restore"):
                each = zip(lanes.configs, lanes.sessions, states, strict=True)
                states = [restore(config, session, run, state) for config, session, state in each]
        with lanes.phases("compile"):
            return lanes.join(states)

    def new_weights(self, task: int) -> Any:
        """Newly initialised weights, and their optimiser's state."""
        return self.lanes.weights([self._weights(config, task) for config in self.lanes.configs])

    def _weights(self, config: ConfigDict, task: int) -> Any:
        return self.run.new_weights(jax.random.fold_in(jax.random.key(config.seed), task))

    def batches(self, task: int, state: TrainState | None = None) -> list[data.Loader]:
        """Of the task's own rows, none where there are none; see `train_batches`."""
        return self._loaders(lambda config, state: train_batches(config, self.run, task, state), state)

    def review(self, task: int, state: TrainState) -> list[data.Loader]:
        """The batches of the task's `Review`, none without one."""
        review = self.run.review
        return [] if review is None else self._loaders(lambda config, state: review.batches(config, state, task), state)

    def _loaders(self, make: Callable[[ConfigDict, Any], data.Loader | None], state: Any) -> list[data.Loader]:
        states = [None if state is None else self.lanes.one(state, i) for i in range(len(self.lanes))]
        found = [make(config, state) for config, state in zip(self.lanes.configs, states, strict=True)]
        loaders = [loader for loader in found if loader is not None]
        if len({len(loader) for loader in loaders}) > 1:
            raise UserError("--vmap: not allowed here, as the memories of the seeds differ in size; leave it out")
        return loaders

    def begin(self, state: TrainState, task: int, loaders: list[data.Loader]) -> TrainState:
        """The state in which the task's first step is taken."""
        start, per_epoch, number = (self.lanes.number(x) for x in (0, loaders[0].steps_per_epoch, task))
        return dataclasses.replace(state, task_step=start, steps_per_epoch=per_epoch, task=number)

    def end(self, act: Callable[..., TrainState], state: TrainState, task: int) -> TrainState:
        """`act` at the task's end, lane after lane."""
        with self.lanes.phases("end of task"):
            each = zip(self.lanes.configs, self.lanes.sessions, strict=True)
            ended = [act(*lane, self.run, self.lanes.one(state, i), task) for i, lane in enumerate(each)]
            return self.lanes.join(ended)

    def evaluate(self, params: Any, batch_stats: Any, strategy_state: Any) -> list[dict[str, np.ndarray]]:
        """The scores of each lane on the rows of all tasks."""
        batches = eval_batches(self.lanes.configs[0], self.run)
        rows = self.lanes.sessions[0].watched(batches, "a batch of the evaluation")
        return self.lanes.split(self.run.evaluate(params, batch_stats, strategy_state, rows))


def _run_tasks(lanes: Lanes[TrainState], run: Experiment, progress: bool) -> list[dict[str, Any]]:
    config, at, phases, tasks = lanes.configs[0], lanes.at, lanes.phases, run.scenario.tasks
    course, store = Course(lanes, run), None if run.buffer is None else run.buffer.host
    loaders = [course.batches(task.index) for task in tasks]
    assert loaders[0], "the first task has no rows"
    state, first = course.start(), lanes.batch([loader[0] for loader in loaders[0]])
    step, review_step = run.train_step, run.review and run.review.step  # type: Any, Any
    if store is None:
        with phases("compile"):
            step = step.lower(state, first).compile()  # every later shape but this one is refused: no retrace
    else:
        lanes.sessions[0].serve(store, int(state.step), state.staged)
        step, review_step = (x and Fed(x, store, phases) for x in (step, review_step))
        with phases("compile"):
            step.compile(state, first)
    to_do = sum(len(x[0]) for x in loaders[at.task + at.rehearsing :] if x) - (0 if at.rehearsing else at.batch)
    name = config.strategy if len(lanes) == 1 else f"{config.strategy}, {len(lanes)} seeds"
    scores: list[dict[str, np.ndarray]] = []
    with tqdm(total=at.step + to_do, initial=at.step, desc=name, unit="step", disable=not progress) as bar:
        for task in tasks[at.task :]:
            bar.set_description(f"{name}, task {task.index + 1} of {len(tasks)}")
            own = loaders[task.index]  # none where the strategy trains nothing in this task
            if run.strategy.fresh and task.index and at.iterator is None:
                state = renewed(state, course.new_weights(task.index), True)
            if own and not at.rehearsing:
                if config.buffer.replay != "draw":
                    bar.total -= len(own[0])
                    own = course.batches(task.index, state)
                    bar.total += len(own[0])
                if at.iterator is None:
                    state = course.begin(state, task.index, own)
                state = train_steps(lanes, step, state, own, bar)
                for i, session in enumerate(lanes.sessions):
                    count_rows(lanes.configs[i], run, session.progress, lanes.one(state, i), own[i], task.index)
                if run.store_exemplars is not None:
                    state = course.end(store_exemplars, state, task.index)
            again = course.review(task.index, state) if own else []
            if again:
                assert run.review is not None
                if not at.rehearsing:
                    lanes.stand(rehearsing=True, iterator=None)
                    state = renewed(state, course.new_weights(task.index), run.review.renews_weights)
                    state = course.begin(state, task.index, again)
                bar.total += len(again[0]) - at.batch
                state = train_steps(lanes, review_step, state, again, bar)
                if not run.review.renews_weights:
                    for session, loader in zip(lanes.sessions, again, strict=True):
                        session.progress.counts.setdefault("tuned", []).append(loader.rows_per_epoch)
                    state = renewed(state, course.new_weights(task.index), False)
            if own and run.strategy.end_task is not None:
                state = course.end(end_task, state, task.index)
            with phases("evaluate"):
                scores = course.evaluate(state.params, state.batch_stats, state.strategy_state)
            for session, mine in zip(lanes.sessions, scores, strict=True):
                rows = add_scores(session.progress, mine)
                session.log.write("evaluation", at.step, {"task": task.index, **rows})
                session.log.write_seconds(at.step, session.phases.seconds, {} if store is None else store.seconds)
                so_far = {name: np.mean(row[: task.index + 1]) for name, row in rows.items()}
                shown = {name: f"{x:.4f}" if name == "error" else f"{100 * x:.1f} %" for name, x in so_far.items()}
                bar.set_postfix(shown)
            lanes.stand(task=task.index + 1, rehearsing=False, iterator=None)
            lanes.save(state)
            if at.task < len(tasks):
                lanes.stop_if_asked()
    with phases("save"):
        for session in lanes.sessions:
            session.checkpoints.wait()
    with phases("evaluate"):
        if not scores:  # the run was stopped after its last task
            scores = course.evaluate(state.params, state.batch_stats, state.strategy_state)
        params, batch_stats, _ = course.new_weights(0)  # against which forward transfer is measured
        init = jax.jit(lanes.each(run.strategy.init), out_shardings=mesh_lib.replicated(run.mesh))
        measure = "error" if run.train.targets else "accuracy"
        untrained = [mine[measure] for mine in course.evaluate(params, batch_stats, init(params, batch_stats))]
    together = {"seeds_together": len(lanes)} if len(lanes) > 1 else {}
    background = {} if store is None else {"background_seconds": dict(store.seconds)}  # of this session's first process
    return [
        summarize(lanes.configs[i], run, session.progress, lanes.one(state, i), scores[i], untrained[i])
        | together
        | background
        for i, session in enumerate(lanes.sessions)
    ]


def train_steps(lanes: Lanes[S], step: Callable, state: S, loaders: Sequence[data.Loader], bar: tqdm) -> S:
    """The steps of one task, or of the rehearsal at its end, that are not done yet. Metrics are fetched a logging interval
    late, so that the devices never wait for them; a checkpoint waits, so that the log it belongs to is complete."""
    pending: tuple[int, int, dict] | None = None
    at, phases, steps = lanes.at, lanes.phases, len(loaders[0])

    def flush() -> None:
        nonlocal pending
        if pending is None:
            return
        (number, index, values), pending = pending, None
        each = [{name: float(x) for name, x in mine.items()} for mine in lanes.split(jax.device_get(values))]
        for session, mine in zip(lanes.sessions, each, strict=True):
            epoch = index / loaders[0].steps_per_epoch
            session.log.write("train", number, {"task": at.task, "epoch": epoch, **mine})
        losses = [mine.get("loss", 0.0) for mine in each]
        if not np.isfinite(losses).all():
            what = f"the loss is {losses[0]}" if len(losses) == 1 else f"the loss of the seeds is {losses}"
            raise Diverged(diverged(what, number, at.task))

    iterators = [iter(loader) for loader in loaders]
    for iterator, session in zip(iterators, lanes.sessions, strict=True):
        if session.progress.iterator is not None:
            iterator.set_state(session.progress.iterator)
    for index in range(at.batch, steps):
        with phases("load"):
            rows = [next(iterator) for iterator in iterators]
        with phases("assemble"):
            batch = lanes.batch(rows)
        with phases("train"):
            try:
                state, values = step(state, batch)
            except Exception:
                if lanes.sessions[0].writer_failed and jax.process_count() == 1:  # else the others have gone on
                    flush()
                    lanes.stand(iterator={"next_index": index})
                    lanes.save(state)  # of the step before; raises what the writer has met with
                raise
            lanes.stand(step=at.step + 1)
            if index % lanes.configs[0].log_every == 0 or index == steps - 1:
                flush()
                pending = (at.step, index, values)
            answer = lanes.after_step(values)
        bar.update()
        if answer != control.GO_ON and index + 1 < steps:  # a save at the task's end, or rehearsal, follows
            with phases("train"):
                flush()
            for iterator, session in zip(iterators, lanes.sessions, strict=True):
                session.progress.iterator = iterator.get_state()
            lanes.save(state)
            lanes.stop_if_asked(answer)
    with phases("train"):
        flush()
        jax.block_until_ready(state)
    return state


def restore(config: ConfigDict, session: Session, run: Experiment, state: TrainState) -> TrainState:
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


def store_exemplars(config: ConfigDict, session: Session, run: Experiment, state: TrainState, task: int) -> TrainState:
    """Fills the memory of a strategy that does so at a task's end."""
    assert run.store_exemplars is not None
    batches = functools.partial(session.watched, task_batches(config, run, task), "a batch at a task's end")
    selecting = jax.random.fold_in(jax.random.key(config.seed), np.uint32(2**32 - 1))  # no step has this number
    return run.store_exemplars(state, task, jax.random.fold_in(selecting, task), batches)


def end_task(config: ConfigDict, session: Session, run: Experiment, state: TrainState, task: int) -> TrainState:
    """What the strategy does when all steps of a task are done."""
    batches = functools.partial(session.watched, task_batches(config, run, task), "a batch at a task's end")
    return run.end_task(state, batches)


def renewed(state: TrainState, weights: tuple[Any, Any, Any], all_of_them: bool) -> TrainState:
    """The state with these new weights and optimiser, or with the new optimiser alone."""
    params, batch_stats, opt_state = weights
    if not all_of_them:
        return dataclasses.replace(state, opt_state=opt_state)
    return dataclasses.replace(state, params=params, batch_stats=batch_stats, opt_state=opt_state)
