"""The loop around the compiled step: tasks, batches, evaluation, logs, checkpoints."""

import dataclasses
import functools
import importlib.metadata
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxcl import checkpoint, data, files, metrics
from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Buffer, make_buffer
from jaxcl.buffer.host import Fed
from jaxcl.buffer.reshard import reshard
from jaxcl.errors import Diverged, UserError
from jaxcl.mesh import AXIS
from jaxcl.models import Model, make_model
from jaxcl.strategies import STRATEGIES, Strategy, make_strategy
from jaxcl.training import control
from jaxcl.training import workdir as workdir_lib
from jaxcl.training.config import check_config
from jaxcl.training.end_task import make_end_task
from jaxcl.training.evaluate import make_evaluate
from jaxcl.training.exemplars import make_store_exemplars
from jaxcl.training.optimizer import make_optimizer, make_schedule
from jaxcl.training.session import Progress, Session, diverged, open_session
from jaxcl.training.state import TrainState, initial_state, make_weights
from jaxcl.training.step import make_train_step, step_keys

STEPPING = ("load", "assemble", "wait", "train", "accumulate")  # of the steps; wait and accumulate are the host tier's


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
    rehearse_step: Any  # the step of strategy.rehearse, None without
    store_exemplars: Callable | None  # of strategies that fill the memory at a task's end
    end_task: Callable
    evaluate: Callable


def make_tasks(config: ConfigDict) -> tuple[data.Scenario, data.Source, data.Source]:
    """The tasks of a run, and the train and test rows that they number; with `data.validation`, validation rows for test.

    Raises:
      UserError: one line on what is wrong with the data or its split.
    """
    d = config.data
    train, test = data.open_source(d.source, d.data_dir, image_size=d.image_size)
    if d.validation:
        train, test = data.hold_out(train, d.validation, d.scenario_seed)
    return data.make_scenario(
        train,
        test,
        d.scenario,
        d.tasks,
        class_order_seed=d.class_order_seed,
        seed=d.scenario_seed,
        scattered=d.scattered,
        disjoint=d.disjoint,
    )


def build(
    config: ConfigDict, devices: Sequence[jax.Device] | None = None, seeds: Sequence[int] | None = None
) -> Experiment:
    """Puts a run together from its config; with `seeds`, several runs whose steps and evaluations are made as one.

    Raises:
      UserError: one line on what is wrong with the config or its data.
    """
    mesh = mesh_lib.make_mesh(devices)
    check_config(config, mesh.size)
    if config.batch_size % jax.process_count():
        raise UserError(f"batch_size: {config.batch_size} is not a multiple of {jax.process_count()} processes")
    strategy = make_strategy(config.strategy, config.strategies.get(config.strategy, {}))
    d = config.data
    scenario, train, test = make_tasks(config)
    augment = data.make_augment(d.augment, train.image_shape, mean=d.mean, std=d.std)
    normalize = data.make_normalize(train.image_shape, mean=d.mean, std=d.std)
    model = make_model(
        config.model.name,
        train.num_classes,
        options=config.model.options.to_dict(),
        dtype=config.model.dtype,
        axis_name=AXIS,
    )
    _check_objective(config, strategy, model, train)
    buffer = None
    if strategy.draws:
        record = _record(model, strategy, train)
        buffer = make_buffer(
            record,
            capacity=_capacity(config.buffer, scenario),
            representatives=config.buffer.representatives,
            policy=_policy(config, strategy),
            num_classes=train.num_classes,
            accept=config.buffer.candidates / config.batch_size,
            mesh=mesh,
            memory=config.buffer.memory,
            exchange=config.buffer.exchange,
            sampling=config.buffer.sampling,
            repeats=config.buffer.repeats,
            num_ids=len(train.labels),
            tier=config.buffer.tier,
            path=config.buffer.path,
            handover=config.buffer.handover,
            queue=config.buffer.queue,
        )
    optimizer = make_optimizer(config.optimizer)
    schedule = make_schedule(config.optimizer, strategy.rehearse or config.epochs)

    def train_step(learn: bool) -> Any:
        return make_train_step(
            mesh,
            model,
            strategy,
            buffer,
            optimizer,
            schedule,
            augment,
            config.seed if seeds is None else tuple(seeds),
            scenario.class_table,
            loss_classes=d.loss_classes,
            learn=learn,
        )

    store_exemplars = None
    if buffer is not None and strategy.exemplars is not None:
        store_exemplars = make_store_exemplars(
            mesh,
            model,
            strategy,
            buffer,
            normalize,
            train,
            scenario.class_table,
            batch_size=config.eval.batch_size,
            sharded=config.buffer.memory == "sharded",
        )

    return Experiment(
        mesh=mesh,
        strategy=strategy,
        train=train,
        test=test,
        scenario=scenario,
        buffer=buffer,
        new_weights=make_weights(mesh, model, optimizer, train.image_shape),
        train_step=train_step(learn=not strategy.rehearse),
        rehearse_step=train_step(learn=True) if strategy.rehearse else None,
        store_exemplars=store_exemplars,
        end_task=make_end_task(mesh, model, strategy, normalize, scenario.class_table),
        evaluate=make_evaluate(
            mesh,
            model,
            normalize,
            scenario,
            strategy.scores,
            seeds=seeds is not None,
            reconstructs=bool(train.targets),
        ),
    )


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
        result |= _times(result["images"], session)
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
    loaders = [_loader(config, run, t) for t in range(len(tasks))]
    assert loaders[0] is not None, "the first task has no rows"
    with phases("compile"):
        state = initial_state(run.mesh, run.new_weights(weights_key(0)), run.buffer, run.strategy)
        first = mesh_lib.shard_rows(run.mesh, loaders[0][0])
        step = run.train_step
        if store is None:
            step = step.lower(state, first).compile()  # every later shape but this one is refused: no retrace
    if session.found is not None:
        with phases("restore"):
            state = _restore(config, run, session, state)
    if store is not None:
        session.serve(store, int(state.step), state.staged)
        step = Fed(step, store, phases)
        run = dataclasses.replace(run, rehearse_step=run.rehearse_step and Fed(run.rehearse_step, store, phases))
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
                state = _renew(state, run.new_weights(weights_key(task.index)))
            if loader is not None and not at.rehearsing:  # without rows the strategy trains nothing in this task
                if at.iterator is None:
                    state = _begin_task(run.mesh, state, task.index, loader.steps_per_epoch)
                state = _train(run.mesh, step, state, loader, config.log_every, session, bar)
                at.images += config.epochs * len(_rows(run, task.index))
                with phases("end of task"):
                    state = _end_task(config, run, session, state, task.index)
            if loader is not None and run.rehearse_step is not None:
                blank = _blank_batches(run, state)
                if not at.rehearsing:
                    at.rehearsing, at.iterator = True, None
                    state = _renew(state, run.new_weights(weights_key(task.index)))
                    state = _begin_task(run.mesh, state, task.index, blank.steps_per_epoch)
                bar.total += len(blank) - at.batch
                state = _train(run.mesh, run.rehearse_step, state, blank, config.log_every, session, bar)
            with phases("evaluate"):
                batches = session.watched(_eval_batches(config, run), "a batch of the evaluation")
                scores = run.evaluate(state.params, state.batch_stats, state.strategy_state, batches)
            rows = _scored(at, scores)
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
            batches = session.watched(_eval_batches(config, run), "a batch of the evaluation")
            scores = run.evaluate(state.params, state.batch_stats, state.strategy_state, batches)
        untrained = _score_untrained(config, run, session, run.new_weights(weights_key(0)))
    return _result(config, run, at, state, scores, untrained)


def _times(images: int, session: Session) -> dict[str, Any]:
    """What result.json says of a run's times."""
    seconds, by_phase = session.seconds(), session.phases.seconds
    return {
        "seconds": seconds,
        "images_per_second": images / max(sum(by_phase.get(name, 0.0) for name in STEPPING), 1e-9),
        "seconds_by_phase": {**by_phase, "other": seconds - sum(by_phase.values())},
    }


def _scored(at: Progress, scores: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Adds the scores of all tasks, as they are after this one, to the progress."""
    rows: dict[str, list[float]] = {
        name: scores[name].tolist() for name in ("accuracy", "top5", "error") if name in scores
    }
    for name, row in rows.items():
        getattr(at, name).append(row)
    return rows


def _result(
    config: ConfigDict, run: Experiment, at: Progress, state: TrainState, scores: dict[str, np.ndarray], untrained: Any
) -> dict[str, Any]:
    """What result.json says of a run but for its times."""
    return {
        "name": config.name,
        "strategy": config.strategy,
        "seed": config.seed,
        "source": config.data.source,
        "model": config.model.name,
        "tasks": [list(task.classes) for task in run.scenario.tasks],
        "evaluated_on": "validation" if config.data.validation else "test",
        **(_errors(at, untrained) if run.train.targets else _accuracies(run, at, scores, untrained)),
        "steps": at.step,
        "images": at.images,
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


def _train(
    mesh: jax.sharding.Mesh,
    step: Callable,
    state: TrainState,
    loader: data.Loader,
    log_every: int,
    session: Session,
    bar: tqdm,
) -> TrainState:
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


def _restore(config: ConfigDict, run: Experiment, session: Session, state: TrainState) -> TrainState:
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
        policy=_policy(config, run.strategy),
        capacity=_capacity(config.buffer, run.scenario),
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


def _policy(config: ConfigDict, strategy: Strategy) -> str:
    """Of the buffer: a strategy with exemplars stores them in rank order."""
    return config.buffer.policy if strategy.exemplars is None else "herding"


def _rows(run: Experiment, task: int) -> np.ndarray:
    """The rows of the train source that a task trains on."""
    return run.strategy.rows(run.scenario, task)


def _loader(config: ConfigDict, run: Experiment, task: int) -> data.Loader | None:
    """Batches of the rows a task trains on; None where there are none."""
    rows = _rows(run, task)
    if not len(rows):
        return None
    return data.train_batches(
        run.train,
        rows,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=(config.seed, task),
        by_class=config.data.placement == "by_class",
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


def _task_batches(config: ConfigDict, run: Experiment, task: int) -> data.Loader:
    """The rows of a task once, for the pass at its end."""
    return data.eval_batches(
        run.train,
        _rows(run, task),
        batch_size=config.eval.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.threads,
    )


def _end_task(config: ConfigDict, run: Experiment, session: Session, state: TrainState, task: int) -> TrainState:
    """What the strategy does when the steps of a task are done."""
    batches = functools.partial(session.watched, _task_batches(config, run, task), "a batch at a task's end")
    if run.store_exemplars is not None:
        state = run.store_exemplars(state, task, batches())
    return run.end_task(state, batches)


def _begin_task(mesh: jax.sharding.Mesh, state: TrainState, task: int, steps_per_epoch: int) -> TrainState:
    task_step, per_epoch, number = (mesh_lib.replicate(mesh, np.int32(x)) for x in (0, steps_per_epoch, task))
    return dataclasses.replace(state, task_step=task_step, steps_per_epoch=per_epoch, task=number)


def _renew(state: TrainState, weights: tuple[Any, Any, Any]) -> TrainState:
    params, batch_stats, opt_state = weights
    return dataclasses.replace(state, params=params, batch_stats=batch_stats, opt_state=opt_state)


def _blank_batches(run: Experiment, state: TrainState) -> data.Loader:
    """The batches of a training on the buffer alone, one row a device and not valid: `Strategy.rehearse` passes over it."""
    assert run.buffer is not None and state.buffer is not None
    return data.blank_batches(
        run.train,
        batch_size=run.mesh.size,
        steps_per_epoch=-(-run.buffer.stats(state.buffer)["rows"] // run.buffer.representatives),
        epochs=run.strategy.rehearse,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _capacity(config: ConfigDict, scenario: data.Scenario) -> int:
    """Rows of the memory."""
    if config.share is None:
        return config.capacity
    return round(config.share * sum(len(task.train) for task in scenario.tasks))


def _outputs(model: Model, image: jax.Array) -> dict[str, jax.Array]:
    """What a new model makes of images, for the shapes."""
    _, h, w, channels = image.shape
    variables = model.init(jax.random.key(0), (h, w, channels))
    return model.apply(**variables, images=image.astype(np.float32), train=False)[0]


def _record(model: Model, strategy: Strategy, source: data.Source) -> Any:
    """Shapes and dtypes of one record of the strategy."""

    def record(image: jax.Array, target: dict[str, jax.Array]) -> Any:
        return strategy.stored(image, _outputs(model, image) if strategy.stores_outputs else {}, target)

    target = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in source.targets.items()}
    rows = jax.eval_shape(record, jax.ShapeDtypeStruct((1, *source.image_shape), np.uint8), target)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)


def _check_objective(config: ConfigDict, strategy: Strategy, model: Model, source: data.Source) -> None:
    """Whether data, model and strategy are all for classification or all for reconstruction.

    Raises:
      UserError: they are not.
    """
    image = jax.ShapeDtypeStruct((1, *source.image_shape), np.uint8)
    made = {name: x.shape[1:] for name, x in jax.eval_shape(functools.partial(_outputs, model), image).items()}
    wanted = {name: x.shape[1:] for name, x in source.targets.items()}
    if not wanted and "logits" not in made:
        raise UserError(f"model.name: {model.name} reconstructs {', '.join(made)}, which {config.data.source} has not")
    if any(made.get(name) != shape for name, shape in wanted.items()):
        raise UserError(f"model.name: {model.name} does not reconstruct the {wanted} of {config.data.source}")
    if wanted and strategy.classifies:
        allowed = [name for name in STRATEGIES if not make_strategy(name).classifies]
        raise UserError(
            f"strategy: {config.strategy} classifies, {config.data.source} is to be reconstructed; choose one of "
            f"{', '.join(allowed)}"
        )
    if wanted and config.data.augment:
        raise UserError(
            f"data.augment: {tuple(config.data.augment)} is not allowed where images are to be reconstructed, give ()"
        )


def _score_untrained(config: ConfigDict, run: Experiment, session: Session, weights: Any) -> np.ndarray:
    """The accuracy (or error) of newly initialised weights on every task, against which forward transfer is measured."""
    params, batch_stats, _ = weights
    batches = session.watched(_eval_batches(config, run), "a batch of the evaluation")
    own = jax.jit(run.strategy.init, out_shardings=mesh_lib.replicated(run.mesh))(params, batch_stats)
    return run.evaluate(params, batch_stats, own, batches)["error" if run.train.targets else "accuracy"]


def _accuracies(run: Experiment, at: Progress, scores: dict[str, np.ndarray], untrained: Any) -> dict[str, Any]:
    return {
        "accuracy_matrix": at.accuracy,
        **metrics.summarize(at.accuracy),
        **_top5(at.top5, run.train.num_classes),
        "forward_transfer": metrics.forward_transfer(at.accuracy, untrained),
        **_last(scores),
    }


def _errors(at: Progress, untrained: Any) -> dict[str, Any]:
    return {
        "error_matrix": at.error,
        **metrics.summarize_errors(at.error),
        "untrained_error": untrained.tolist(),
    }


def _last(scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is told of the last weights beside the matrix; the confusion matrix where it stays readable."""
    confusion = scores["confusion"]
    kept = {"confusion": confusion.tolist()} if len(confusion) <= 100 else {}
    in_task = scores["accuracy_in_task"].tolist()
    return {"accuracy_in_task": in_task, "per_class_accuracy": metrics.per_class_accuracy(confusion), **kept}


def _top5(matrix: list[list[float]], num_classes: int) -> dict[str, Any]:
    """Top-5 accuracy says something only above five classes."""
    if num_classes <= 5:
        return {}
    so_far = metrics.accuracy_so_far(matrix).tolist()
    return {"top5_matrix": matrix, "average_top5": metrics.average_accuracy(matrix), "top5_so_far": so_far}


def _buffer_report(buffer: Buffer | None, state: TrainState) -> dict[str, Any] | None:
    if buffer is None or state.buffer is None:
        return None
    return {
        "capacity": buffer.capacity,
        "bytes": buffer.num_bytes,
        "traffic": buffer.traffic,
        **buffer.stats(state.buffer),
    }
