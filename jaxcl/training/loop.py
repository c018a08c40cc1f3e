"""A run from its config to its result: the tasks one after the other, of one seed, or of several as one program."""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxcl import data
from jaxcl.check import refused
from jaxcl.runs.frame import in_sessions
from jaxcl.runs.lanes import Lanes, Together
from jaxcl.runs.progress import Shown, shown, title
from jaxcl.runs.session import Session
from jaxcl.training import init_from
from jaxcl.training import weights as weights_lib
from jaxcl.training.build import Parts, build
from jaxcl.training.result import MEASURES, summarize
from jaxcl.training.resume import start
from jaxcl.training.state import TrainState
from jaxcl.training.task import Course, Loaders, Scores, new_weights, own_batches, run_task, scores_of


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    train: Any = None,
    test: Any = None,
    devices: Sequence[jax.Device] | None = None,
    progress: Shown = True,
    overwrite: bool = False,
    start_seconds: float | None = None,
    stall_seconds: float | None = None,
) -> dict[str, Any]:
    """Trains over all tasks, evaluating on every task's test rows after each, and leaves a finished run in `workdir`.

    A finished run of the same config is returned as it is; an unfinished one is continued from its last checkpoint, on any
    number of devices and processes. In a run of several processes all call this alike and share `workdir`.

    Args:
      config: see `jaxcl.training.config.default_config`.
      workdir: the run's folder, made if needed.
      train, test: data to use instead of `config.data.source`: (images uint8 `[n, H, W]` or `[n, H, W, C]`, labels int `[n]`),
        a dict of "images", "labels" and maybe "class_names", a `jaxcl.data.Source`, or rows by random access, as Grain's and
        TFDS's data sources give them: dicts of "image" and "label", or pairs. The folder then belongs to these data.
      devices: to train on; default all.
      progress: whether to show it, as a bar in a terminal, else as one line a task; `jaxcl.runs.progress.Runs` numbers the run.
      overwrite: remove what an earlier run left in `workdir` instead of continuing it.
      start_seconds: a process of several ends itself when the others, or its first step, take so long; None: never.
      stall_seconds: the same, later, when no step is finished for so long.

    Returns:
      What result.json holds.

    Raises:
      UserError: one line on what is wrong with config, data or workdir, before anything is compiled.
      Preempted: SIGTERM came; the run is saved and can be continued.
      Diverged: the loss or a parameter is not finite.
      StorageError: the disk is full.
    """
    begin = time.perf_counter()
    given = None
    if train is not None or test is not None:
        config, given = with_given(config, train, test)
    config = init_from.bound(config)
    parts = build(config, devices, given=given)
    options: Any = {"begin": begin, "progress": progress, "overwrite": overwrite}
    options |= {"start_seconds": start_seconds, "stall_seconds": stall_seconds}
    return train_lanes([config], [pathlib.Path(workdir)], parts, **options)[0]


def with_given(config: ConfigDict, train: Any, test: Any) -> tuple[ConfigDict, tuple[data.Source, data.Source]]:
    """The config of a run on data that were handed over, which says so, and their sources.

    Raises:
      UserError: see `jaxcl.data.given.given_sources`; images are to be cut, which only sources of files do.
    """
    sources = data.given_sources(train, test)
    if config.data.image_size is not None:
        raise refused("data.image_size", config.data.image_size, "None with images that are handed over")
    config = config.copy_and_resolve_references()
    config.data.source = data.given_name(*sources)
    return config, sources


def train_lanes(
    configs: Sequence[ConfigDict], folders: Sequence[pathlib.Path], parts: Parts, *, progress: Shown, **options: Any
) -> list[dict[str, Any]]:
    """The runs of these configs, which differ in their seed alone, side by side in one program.

    Args:
      parts: built for these seeds.
      progress: see `train_and_evaluate`.
      options: see `in_sessions`.

    Returns, raises: see `train_and_evaluate`.
    """
    make_lanes: type[Lanes[TrainState]] = Lanes if len(configs) == 1 else Together
    name = title(progress, configs[0].strategy, configs)

    def carry_out(sessions: Sequence[Session]) -> list[dict[str, Any]]:
        return run_tasks(make_lanes(parts.mesh, configs, sessions), parts, name, bool(progress))

    network = {"network": weights_lib.describe(parts)}
    return in_sessions(configs, folders, parts.mesh, carry_out, manifest=network, **options)


def run_tasks(lanes: Lanes[TrainState], parts: Parts, name: str, progress: bool) -> list[dict[str, Any]]:
    """Trains over the tasks not done yet, shown under `name`; what result.json holds of each lane but for its times."""
    at, tasks = lanes.at, parts.scenario.tasks
    own = [own_batches(lanes, parts, task.index) for task in tasks]
    assert own[0], "the first task has no rows"
    if parts.network.activations:
        with lanes.phases("features"):
            parts.network.prepare()
    state, scores = start(lanes, parts), []  # type: TrainState, list[Scores]
    if parts.host is not None:
        lanes.sessions[0].serve(parts.host, int(state.step), state.staged)
    with lanes.phases("compile"):
        if parts.many_steps is None:
            first = lanes.batch([loader[0] for loader in own[0]])
            step = parts.train_step.prepare(state, first, lanes.phases)
        else:
            first, _ = parts.many_steps.feed(lanes, own[0])(0, 1)
            step = parts.many_steps.prepare(state, first)
    with shown(name, at.step + steps_to_do(lanes, own), at.step, progress and jax.process_index() == 0) as bar:
        course = Course(lanes, parts, step, bar)
        for task in range(at.task, len(tasks)):
            bar.begin(f"task {task + 1} of {len(tasks)}")
            state, scores = run_task(course, state, task)
    with lanes.phases("save"):
        for i, session in enumerate(lanes.sessions):
            session.checkpoints.wait()
            weights_lib.write(
                session.folder, lanes.configs[i], parts, lanes.one(state, i).evaluated, session.progress.step
            )
    return results(lanes, parts, state, scores)


def steps_to_do(lanes: Lanes[TrainState], own: Sequence[Loaders]) -> int:
    """Steps over the tasks' own rows that are not taken yet, where no rows are appended."""
    at = lanes.at
    left = sum(len(loaders[0]) for loaders in own[at.task + at.rehearsing :] if loaders)
    return left if at.rehearsing else left - at.batch


def results(lanes: Lanes[TrainState], parts: Parts, state: TrainState, scores: list[Scores]) -> list[dict[str, Any]]:
    """What result.json holds of each lane but for its times; `scores` of the last task, [] if it was done before."""
    with lanes.phases("evaluate"):
        if not scores:
            scores = scores_of(lanes, parts, state)
        params, batch_stats, _ = new_weights(lanes, parts, 0)  # against which forward transfer is measured
        own = lanes.each(parts.new_strategy_state)(params, batch_stats)
        new = dataclasses.replace(state, params=params, batch_stats=batch_stats, strategy_state=own, average=None)
        untrained = scores_of(lanes, parts, new)
    measure = MEASURES[bool(parts.train.targets)]
    more: dict[str, Any] = {"seeds_together": len(lanes)} if len(lanes) > 1 else {}
    more |= (
        {} if parts.host is None else {"background_seconds": dict(parts.host.seconds)}
    )  # of this session's first process
    each = zip(lanes.configs, lanes.sessions, scores, untrained, strict=True)
    return [
        summarize(config, parts, session.progress, lanes.one(state, i), mine, before[measure]) | more
        for i, (config, session, mine, before) in enumerate(each)
    ]
