"""Several seeds of one config in one program: the steps and the evaluations of all are made as one, by `vmap`.

A small model leaves most of a device idle, and a step of it costs more to start than to compute; n seeds side by side cost
far less than n times one. The seeds share nothing: each has its own weights, order of rows, buffer and random numbers, and
leaves its own folder, as if run alone, equal to rounding. What ends a task runs seed after seed.

Beyond that a folder does not know of the others: it can be continued alone, and a run begun alone can be continued here.
Seeds go on together where they stand at the same step. Its times are those of the whole program, which `seeds_together` in
result.json tells.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxcl import checkpoint, data, files
from jaxcl import mesh as mesh_lib
from jaxcl.errors import Diverged, UserError
from jaxcl.mesh import AXIS
from jaxcl.strategies import make_strategy
from jaxcl.training import control, experiment, loop
from jaxcl.training import workdir as workdir_lib
from jaxcl.training.experiment import train_batches
from jaxcl.training.result import add_scores, count_rows, summarize, times
from jaxcl.training.session import Session, diverged, open_session
from jaxcl.training.state import TrainState, initial_state

PyTree = Any


def check_together(config: ConfigDict) -> None:
    """Checks what can be told without data.

    Raises:
      UserError: seeds of this config cannot be trained together.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"--vmap: not allowed in a run of {jax.process_count()} processes, which train one seed at a time"
        )
    strategy = make_strategy(config.strategy, config.strategies.get(config.strategy, {}))
    if strategy.rehearse:
        raise UserError(
            f"--vmap: not allowed with {config.strategy}, which trains new weights at a task's end; leave it out"
        )
    if strategy.draws and config.buffer.tier == "host":
        raise UserError(
            "--vmap: not allowed with buffer.tier = host, whose rows belong to one seed; give tier = device"
        )


def train_seeds(
    config: ConfigDict,
    folders: dict[int, pathlib.Path],
    *,
    together: bool = True,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = True,
    overwrite: bool = False,
    stall_seconds: float | None = None,
) -> list[dict[str, Any]]:
    """As `train_and_evaluate` for each seed, as one program or, without `together`, one after the other.

    Args:
      config: of all runs but for its seed.
      folders: seed -> the folder of its run.
      together: see above.
      devices, progress, overwrite, stall_seconds: see `train_and_evaluate`.

    Returns:
      What each result.json holds, in the order of `folders`.

    Raises:
      UserError, Preempted, Diverged, StorageError: see `train_and_evaluate`; what befalls one seed ends all.
    """
    if together:
        check_together(config)
    options: Any = {"devices": devices, "progress": progress, "stall_seconds": stall_seconds}
    groups: dict[str | None, list[int]] = defaultdict(list)
    for seed, folder in folders.items():
        groups[_standing(folder, overwrite) if together else None].append(seed)
    found: dict[int, dict[str, Any]] = {}
    for standing, seeds in groups.items():
        configs = {seed: with_seed(config, seed) for seed in seeds}
        if together and standing is None:  # finished
            found |= {seed: _finished(one, folders[seed]) for seed, one in configs.items()}
        elif standing is None or len(seeds) == 1:  # none to go with
            for seed, one in configs.items():
                found[seed] = loop.train_and_evaluate(one, folders[seed], overwrite=overwrite, **options)
        else:
            found |= _train_together(configs, {seed: folders[seed] for seed in seeds}, overwrite=overwrite, **options)
    return [found[seed] for seed in folders]


def with_seed(config: ConfigDict, seed: int) -> ConfigDict:
    one = config.copy_and_resolve_references()
    one.seed = seed
    return one


def _finished(config: ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
    """The result of a finished run of the config, for which no data are opened."""
    with workdir_lib.locked(folder):
        result = workdir_lib.claim(folder, config)
    assert result is not None, "a run that was finished a moment ago"
    return result


def _standing(folder: pathlib.Path, overwrite: bool) -> str | None:
    """The name of the checkpoint from which a run goes on, "" at its start, None if it is finished."""
    if overwrite:
        return ""
    with workdir_lib.locked(folder):
        if (folder / "result.json").exists():
            return None
        manifest = checkpoint.newest(folder / "checkpoints")
    return manifest["name"] if manifest else ""


def _train_together(
    configs: dict[int, ConfigDict],
    folders: dict[int, pathlib.Path],
    *,
    devices: Sequence[jax.Device] | None,
    progress: bool,
    overwrite: bool,
    stall_seconds: float | None,
) -> dict[int, dict[str, Any]]:
    """Runs that stand at the same step, or all at the start."""
    begin, seeds = time.perf_counter(), list(configs)
    run = experiment.build(configs[seeds[0]], devices, seeds)
    with contextlib.ExitStack() as stack:
        sessions = []
        for seed, config in configs.items():
            stack.enter_context(files.full_disk_is_a_storage_error(folders[seed]))
            options: Any = {"begin": begin, "overwrite": overwrite, "stall_seconds": stall_seconds}
            session = stack.enter_context(open_session(config, folders[seed], run.mesh, **options))
            assert isinstance(session, Session), "a finished run is not continued"
            sessions.append(session)
        results = _run_tasks(list(configs.values()), run, sessions, progress)
        for session, result, folder in zip(sessions, results, folders.values(), strict=True):
            result |= {**times(result["images"], session), "seeds_together": len(seeds)}
            files.write_json(folder / "result.json", result)
    return dict(zip(seeds, results, strict=True))


class Lanes:
    """Between one state a seed and the state of all, whose leaves have a leading axis of n seeds, whole on every device.

    Args:
      one: the state of any seed, for its shardings.
    """

    def __init__(self, mesh: jax.sharding.Mesh, one: TrainState):
        self._mesh, alone = mesh, jax.tree.map(lambda x: x.sharding, one)
        together = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(None, *s.spec)), alone)
        self._join = jax.jit(lambda *states: jax.tree.map(lambda *x: jnp.stack(x), *states), out_shardings=together)
        self.one: Callable[[TrainState, int], TrainState] = jax.jit(
            lambda state, i: jax.tree.map(lambda x: x[i], state), out_shardings=alone
        )

    def join(self, states: Sequence[TrainState]) -> TrainState:
        return self._join(*states)

    def batch(self, batches: Sequence[data.Batch]) -> PyTree:
        """Each seed's rows, `[n, b, ...]`, split over the devices along b."""
        sharding = NamedSharding(self._mesh, PartitionSpec(None, AXIS))
        return jax.tree.map(lambda *x: jax.device_put(np.stack(x), sharding), *batches)

    def weights(self, each: Sequence[PyTree]) -> PyTree:
        """What every device holds whole, of all seeds."""
        whole = mesh_lib.replicated(self._mesh)
        return jax.jit(lambda *x: jax.tree.map(lambda *y: jnp.stack(y), *x), out_shardings=whole)(*each)


@contextlib.contextmanager
def _phase(sessions: Sequence[Session], name: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for session in sessions:
            stack.enter_context(session.phases(name))
        yield


def _run_tasks(
    configs: Sequence[ConfigDict], run: experiment.Experiment, sessions: Sequence[Session], progress: bool
) -> list[dict[str, Any]]:
    """As `loop._run_tasks`, for all seeds at once."""

    def new_weights(task: int) -> list[PyTree]:
        return [run.new_weights(jax.random.fold_in(jax.random.key(config.seed), task)) for config in configs]

    def evaluate(params: PyTree, batch_stats: PyTree, strategy_state: PyTree) -> list[dict[str, np.ndarray]]:
        batches = sessions[0].watched(experiment.eval_batches(configs[0], run), "a batch of the evaluation")
        found = run.evaluate(params, batch_stats, strategy_state, batches)
        return [{name: x[i] for name, x in found.items()} for i in range(len(configs))]

    def batches_of(
        make: Callable[[ConfigDict, TrainState, int], data.Loader | None], state: TrainState, task: int
    ) -> list[data.Loader | None]:
        return [make(config, lanes.one(state, i), task) for i, config in enumerate(configs)]

    def with_memory(config: ConfigDict, state: TrainState, task: int) -> data.Loader | None:
        return train_batches(config, run, task, state)

    def end(act: Callable[..., TrainState], state: TrainState, task: int) -> TrainState:
        """What is done at a task's end, seed after seed."""
        with _phase(sessions, "end of task"):
            ended = [
                act(config, run, session, lanes.one(state, i), task)
                for i, (config, session) in enumerate(zip(configs, sessions, strict=True))
            ]
            return lanes.join(ended)

    ats, tasks, scores = [session.progress for session in sessions], run.scenario.tasks, None
    at, first = ats[0], configs[0]
    loaders = [[train_batches(config, run, t) for config in configs] for t in range(len(tasks))]
    lengths = [0 if each[0] is None else len(each[0]) for each in loaders]
    with _phase(sessions, "compile"):
        states = [initial_state(run.mesh, weights, run.buffer, run.strategy) for weights in new_weights(0)]
        lanes = Lanes(run.mesh, states[0])
    with _phase(sessions, "restore") if sessions[0].found is not None else contextlib.nullcontext():
        if sessions[0].found is not None:
            rest = zip(configs, sessions, states, strict=True)
            states = [loop.restore(config, run, session, state) for config, session, state in rest]
        state = lanes.join(states)
        del states
    with _phase(sessions, "compile"):
        step = run.train_step.lower(state, lanes.batch([loader[0] for loader in loaders[0] if loader])).compile()
    with tqdm(
        total=at.step + sum(lengths[at.task + at.rehearsing :]) - (0 if at.rehearsing else at.batch),
        initial=at.step,
        desc=f"{first.strategy}, {len(configs)} seeds",
        unit="step",
        disable=not progress,
    ) as bar:
        for task in tasks[at.task :]:
            own = [loader for loader in loaders[task.index] if loader is not None]
            if run.strategy.fresh and task.index and at.iterator is None:
                state = loop.renewed(state, lanes.weights(new_weights(task.index)), True)
            if own and not at.rehearsing:
                if first.buffer.replay != "draw":
                    bar.total -= len(own[0])
                    own = _of_one_length(batches_of(with_memory, state, task.index))
                    bar.total += len(own[0])
                if at.iterator is None:
                    state = _begin_task(run.mesh, state, task.index, own[0].steps_per_epoch, len(configs))
                state = _train_task(lanes, step, state, own, first.log_every, sessions, bar)
                for i, config in enumerate(configs):
                    count_rows(config, run, ats[i], lanes.one(state, i), own[i], task.index)
                if run.store_exemplars is not None:
                    state = end(loop.store_exemplars, state, task.index)
            review = run.review if own else None
            again = [] if review is None else _of_one_length(batches_of(review.batches, state, task.index))
            if review is not None and again:
                if not at.rehearsing:
                    for progressed in ats:
                        progressed.rehearsing, progressed.iterator = True, None
                    state = loop.renewed(state, lanes.weights(new_weights(task.index)), False)
                    state = _begin_task(run.mesh, state, task.index, again[0].steps_per_epoch, len(configs))
                bar.total += len(again[0]) - at.batch
                state = _train_task(lanes, review.step, state, again, first.log_every, sessions, bar)
                for progressed, loader in zip(ats, again, strict=True):
                    progressed.tuned.append(loader.rows_per_epoch)
                state = loop.renewed(state, lanes.weights(new_weights(task.index)), False)
            if own and run.strategy.end_task is not None:
                state = end(loop.end_task, state, task.index)
            with _phase(sessions, "evaluate"):
                scores = evaluate(state.params, state.batch_stats, state.strategy_state)
            for session, score in zip(sessions, scores, strict=True):
                rows = add_scores(session.progress, score)
                session.log.write("evaluation", session.progress.step, {"task": task.index, **rows})
                session.log.write_seconds(session.progress.step, session.phases.seconds, {})
                at_end = session.progress
                at_end.task, at_end.rehearsing, at_end.iterator = task.index + 1, False, None
            _save(lanes, state, sessions)
            if at.task < len(tasks):
                for session in sessions:
                    session.stop_if_asked()
    with _phase(sessions, "save"):
        for session in sessions:
            session.checkpoints.wait()
    with _phase(sessions, "evaluate"):
        if scores is None:  # the runs were stopped after their last task
            scores = evaluate(state.params, state.batch_stats, state.strategy_state)
        params, batch_stats, _ = lanes.weights(new_weights(0))
        init = jax.jit(jax.vmap(run.strategy.init), out_shardings=mesh_lib.replicated(run.mesh))
        measure = "error" if run.train.targets else "accuracy"
        untrained = [score[measure] for score in evaluate(params, batch_stats, init(params, batch_stats))]
    return [
        summarize(config, run, ats[i], lanes.one(state, i), scores[i], untrained[i]) for i, config in enumerate(configs)
    ]


def _of_one_length(loaders: Sequence[data.Loader | None]) -> list[data.Loader]:
    """Those that there are.

    Raises:
      UserError: they differ in length.
    """
    found = [loader for loader in loaders if loader is not None]
    if len({len(loader) for loader in found}) > 1:
        raise UserError("--vmap: not allowed here, as the memories of the seeds differ in size; leave it out")
    return found


def _begin_task(mesh: jax.sharding.Mesh, state: TrainState, task: int, steps_per_epoch: int, n: int) -> TrainState:
    task_step, per_epoch, number = (
        mesh_lib.replicate(mesh, np.full(n, x, np.int32)) for x in (0, steps_per_epoch, task)
    )
    return dataclasses.replace(state, task_step=task_step, steps_per_epoch=per_epoch, task=number)


def _save(lanes: Lanes, state: TrainState, sessions: Sequence[Session]) -> None:
    for i, session in enumerate(sessions):
        session.save(lanes.one(state, i))


def _train_task(
    lanes: Lanes,
    step: Callable,
    state: TrainState,
    loaders: Sequence[data.Loader],
    log_every: int,
    sessions: Sequence[Session],
    bar: tqdm,
) -> TrainState:
    """As `loop._train`, for all seeds at once."""
    pending: tuple[int, int, dict] | None = None
    at = sessions[0].progress

    def flush() -> None:
        nonlocal pending
        if pending is None:
            return
        (number, index, values), pending = pending, None
        values = jax.device_get(values)
        epoch = index / loaders[0].steps_per_epoch
        for i, session in enumerate(sessions):
            mine = {name: float(value[i]) for name, value in values.items()}
            session.log.write("train", number, {"task": at.task, "epoch": epoch, **mine})
        if not np.isfinite(values.get("loss", 0.0)).all():
            raise Diverged(diverged(f"the loss of the seeds is {values['loss'].tolist()}", number, at.task))

    iterators, begin = [iter(loader) for loader in loaders], at.iterator["next_index"] if at.iterator else 0
    if at.iterator is not None:
        for iterator, session in zip(iterators, sessions, strict=True):
            iterator.set_state(session.progress.iterator)
    for index in range(begin, len(loaders[0])):
        with _phase(sessions, "load"):
            batch = lanes.batch([next(iterator) for iterator in iterators])
        with _phase(sessions, "train"):
            state, values = step(state, batch)
            for session in sessions:
                session.progress.step += 1
            if index % log_every == 0 or index == len(loaders[0]) - 1:
                flush()
                pending = (at.step, index, values)
            answer = max([session.after_step(at.step, values) for session in sessions])
        bar.update()
        if answer != control.GO_ON and index + 1 < len(loaders[0]):
            with _phase(sessions, "train"):
                flush()
            for iterator, session in zip(iterators, sessions, strict=True):
                session.progress.iterator = iterator.get_state()
            _save(lanes, state, sessions)
            for session in sessions:
                session.stop_if_asked(answer)
    with _phase(sessions, "train"):
        flush()
        jax.block_until_ready(state)
    return state
