"""The loop around the compiled step: tasks, batches, evaluation, logs."""

import collections
import contextlib
import dataclasses
import importlib.metadata
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxcl import data, metrics
from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Buffer, make_buffer
from jaxcl.errors import UserError
from jaxcl.mesh import AXIS
from jaxcl.models import make_model
from jaxcl.strategies import Strategy, make_strategy
from jaxcl.training import workdir as workdir_lib
from jaxcl.training.config import check_config
from jaxcl.training.evaluate import make_evaluate
from jaxcl.training.optimizer import make_optimizer, make_schedule
from jaxcl.training.state import TrainState, initial_state, make_weights
from jaxcl.training.step import make_train_step


class Phases:
    """Wall seconds by phase of the loop."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run, built and checked; nothing is compiled yet."""

    mesh: jax.sharding.Mesh
    strategy: Strategy
    train: data.Source
    test: data.Source
    scenario: data.Scenario
    buffer: Buffer | None
    new_weights: Callable[[jax.Array], Any]
    train_step: Any  # jitted: see make_train_step
    evaluate: Callable


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """Puts a run together from its config.

    Raises:
      UserError: one line on what is wrong with the config or its data.
    """
    mesh = mesh_lib.make_mesh(devices)
    check_config(config, mesh.size)
    if config.batch_size % jax.process_count():
        raise UserError(f"batch_size: {config.batch_size} is not a multiple of {jax.process_count()} processes")
    strategy = make_strategy(config.strategy)
    d = config.data
    train, test = data.open_source(d.source, d.data_dir)
    scenario = data.class_incremental(train.labels, test.labels, train.num_classes, d.tasks, d.class_order_seed)
    augment = data.make_augment(d.augment, train.image_shape, mean=d.mean, std=d.std)
    normalize = data.make_normalize(train.image_shape, mean=d.mean, std=d.std)
    model = make_model(
        config.model.name,
        train.num_classes,
        options=config.model.options.to_dict(),
        dtype=config.model.dtype,
        axis_name=AXIS,
    )
    buffer = None
    if strategy.record is not None:
        image = jax.ShapeDtypeStruct((1, *train.image_shape), np.uint8)
        record = jax.eval_shape(strategy.record, {"image": image})
        buffer = make_buffer(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), record),
            capacity=config.buffer.capacity,
            representatives=config.buffer.representatives,
            policy=config.buffer.policy,
            num_classes=train.num_classes,
            accept=config.buffer.candidates / config.batch_size,
            mesh=mesh,
        )
    optimizer = make_optimizer(config.optimizer)
    schedule = make_schedule(config.optimizer, config.epochs)

    return Experiment(
        mesh=mesh,
        strategy=strategy,
        train=train,
        test=test,
        scenario=scenario,
        buffer=buffer,
        new_weights=make_weights(mesh, model, optimizer, train.image_shape),
        train_step=make_train_step(mesh, model, strategy, buffer, optimizer, schedule, augment, config.seed),
        evaluate=make_evaluate(mesh, model, normalize, scenario.task_of_class),
    )


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains over all tasks, evaluating on every task's test rows after each, and leaves a finished run in `workdir`.

    A finished run of the same config is returned as it is.

    Args:
      config: see `jaxcl.training.config.default_config`.
      workdir: the run's folder, made if needed.
      devices: to train on; default all.
      progress: whether to draw a progress bar.

    Returns:
      What result.json holds.

    Raises:
      UserError: one line on what is wrong with config, data or workdir, before anything is compiled.
    """
    begin = time.perf_counter()
    run = build(config, devices)
    folder = pathlib.Path(workdir)
    writer = jax.process_index() == 0
    if writer and (finished := workdir_lib.claim(folder, config)) is not None:
        return finished
    log = workdir_lib.Log(folder, writer)
    phases = Phases()
    try:
        result = _run_tasks(config, run, log, phases, progress and writer)
    finally:
        log.close()
    seconds = time.perf_counter() - begin
    result |= {
        "seconds": seconds,
        "images_per_second": result["images"] / max(phases.seconds["load"] + phases.seconds["train"], 1e-9),
        "seconds_by_phase": {**phases.seconds, "other": seconds - sum(phases.seconds.values())},
    }
    if writer:
        workdir_lib.write_json(folder / "result.json", result)
    return result


def _run_tasks(config: ConfigDict, run: Experiment, log: workdir_lib.Log, phases: Phases, progress: bool) -> dict:
    def weights_key(task: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(config.seed), task)

    tasks = run.scenario.tasks
    loaders = [_loader(config, run, t) for t in range(len(tasks))]
    with phases("compile"):
        state = initial_state(run.mesh, run.new_weights(weights_key(0)), run.buffer)
        first = mesh_lib.shard_rows(run.mesh, loaders[0][0])
        step = run.train_step.lower(state, first).compile()  # every later shape but this one is refused: no retrace
    images = 0
    matrices: dict[str, list[list[float]]] = {"accuracy": [], "top5": []}
    bar = tqdm(total=sum(map(len, loaders)), desc=config.strategy, unit="step", disable=not progress)
    for task, loader in zip(tasks, loaders, strict=True):
        if run.strategy.fresh and task.index:
            params, batch_stats, opt_state = run.new_weights(weights_key(task.index))
            state = dataclasses.replace(state, params=params, batch_stats=batch_stats, opt_state=opt_state)
        state = _begin_task(run.mesh, state, loader.steps_per_epoch)
        bar.set_description(f"{config.strategy}, task {task.index + 1} of {len(tasks)}")
        state = _train_task(run.mesh, step, state, loader, task.index, config.log_every, log, phases, bar)
        images += config.epochs * len(_rows(run, task.index))
        with phases("evaluate"):
            batches = _eval_batches(config, run)
            scores = run.evaluate(state.params, state.batch_stats, batches)
        for name, rows in matrices.items():
            rows.append(scores[name].tolist())
        log.write("evaluation", int(state.step), {"task": task.index, **{n: m[-1] for n, m in matrices.items()}})
        bar.set_postfix(accuracy=f"{100 * np.mean(scores['accuracy'][: task.index + 1]):.1f} %")
    bar.close()
    return {
        "name": config.name,
        "strategy": config.strategy,
        "seed": config.seed,
        "source": config.data.source,
        "model": config.model.name,
        "tasks": [list(task.classes) for task in tasks],
        "accuracy_matrix": matrices["accuracy"],
        **metrics.summarize(matrices["accuracy"]),
        **_top5(matrices["top5"], run.train.num_classes),
        "steps": int(state.step),
        "images": images,
        "buffer": _buffer_report(run.buffer, state),
        "devices": {
            "count": run.mesh.size,
            "kind": run.mesh.devices.flat[0].device_kind,
            "platform": run.mesh.devices.flat[0].platform,
            "processes": jax.process_count(),
        },
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "config": workdir_lib.resolved(config),
    }


def _train_task(
    mesh: jax.sharding.Mesh,
    step: Callable,
    state: TrainState,
    loader: data.Loader,
    task: int,
    log_every: int,
    log: workdir_lib.Log,
    phases: Phases,
    bar: tqdm,
) -> TrainState:
    """All steps of one task. Metrics are fetched a logging interval late, so that the devices never wait for them."""
    pending: tuple[int, int, dict] | None = None

    def flush() -> None:
        if pending is not None:
            number, at, values = pending
            values = {name: float(value) for name, value in jax.device_get(values).items()}
            log.write("train", number, {"task": task, "epoch": at / loader.steps_per_epoch, **values})
            if not np.isfinite(values["loss"]):
                raise FloatingPointError(f"the loss is {values['loss']} at step {number}, task {task}")

    batches = iter(loader)
    steps_before = int(state.step)
    for at in range(len(loader)):
        with phases("load"):
            batch = mesh_lib.shard_rows(mesh, next(batches))
        with phases("train"):
            state, values = step(state, batch)
            if at % log_every == 0 or at == len(loader) - 1:
                flush()
                pending = (steps_before + at + 1, at, values)
        bar.update()
    with phases("train"):
        flush()
        jax.block_until_ready(state)
    return state


def _rows(run: Experiment, task: int) -> np.ndarray:
    """The rows of the train source that a task trains on."""
    return run.scenario.seen(task) if run.strategy.cumulative else run.scenario.tasks[task].train


def _loader(config: ConfigDict, run: Experiment, task: int) -> data.Loader:
    return data.train_batches(
        run.train,
        _rows(run, task),
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=(config.seed, task),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.threads,
    )


def _eval_batches(config: ConfigDict, run: Experiment) -> data.Loader:
    return data.eval_batches(
        run.test,
        np.concatenate([task.test for task in run.scenario.tasks]),
        batch_size=config.eval.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.threads,
    )


def _begin_task(mesh: jax.sharding.Mesh, state: TrainState, steps_per_epoch: int) -> TrainState:
    task_step, per_epoch = (mesh_lib.replicate(mesh, np.int32(x)) for x in (0, steps_per_epoch))
    return dataclasses.replace(state, task_step=task_step, steps_per_epoch=per_epoch)


def _top5(matrix: list[list[float]], num_classes: int) -> dict[str, Any]:
    """Top-5 accuracy says something only above five classes."""
    if num_classes <= 5:
        return {}
    return {"top5_matrix": matrix, "average_top5": metrics.average_accuracy(matrix)}


def _buffer_report(buffer: Buffer | None, state: TrainState) -> dict[str, Any] | None:
    if buffer is None or state.buffer is None:
        return None
    return {"capacity": buffer.capacity, "bytes": buffer.num_bytes, **buffer.stats(state.buffer)}
