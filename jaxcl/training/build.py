"""The parts of a run, put together from its config: data, model, strategy, buffer and the compiled functions; its batches."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxcl import data
from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Buffer, make_buffer
from jaxcl.errors import UserError
from jaxcl.mesh import AXIS
from jaxcl.models import Model, make_model
from jaxcl.strategies import STRATEGIES, Strategy, make_strategy
from jaxcl.training.config import check_config
from jaxcl.training.end_task import make_end_task
from jaxcl.training.evaluate import make_evaluate
from jaxcl.training.exemplars import Selection, make_store_exemplars
from jaxcl.training.optimizer import make_optimizer, make_schedule
from jaxcl.training.replay import choices, finetune_batches, memory_rows
from jaxcl.training.sizes import check_sizes, check_tasks
from jaxcl.training.state import TrainState, make_weights
from jaxcl.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Review:
    """A second phase of every task, on the memory alone: `Strategy.rehearse` or `config.finetune`.

    Attributes:
      step: jitted, see `make_train_step`.
      batches: `(config, state, task) -> Loader`, None where a task has no such phase.
      renews_weights: whether it trains new weights; else only the optimiser's state is new, as it is for the next task.
    """

    step: Any
    batches: Callable[[ConfigDict, TrainState, int], data.Loader | None]
    renews_weights: bool


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
    review: "Review | None"
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
    check_tasks(d.tasks, (len(train) + len(test)) * (d.scenario in ("permuted", "rotated")))
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
    strategy = strategy_of(config)
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
        classes=scenario.class_table,
    )
    _check_objective(config, strategy, model, train)
    optimizer = make_optimizer(config.optimizer)
    new_weights = make_weights(mesh, model, optimizer, train.image_shape)
    record = _record(model, strategy, train) if strategy.draws else None
    capacity = capacity_of(config.buffer, scenario)
    sizes: Any = {"record": record, "capacity": capacity, "draws": strategy.draws, "seeds": len(seeds or [0])}
    check_sizes(config, mesh, new_weights, train.image_shape, **sizes)
    buffer = None
    if strategy.draws:
        buffer = make_buffer(
            record,
            capacity=capacity,
            representatives=config.buffer.representatives,
            policy=policy_of(config, strategy),
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
    schedule = make_schedule(config.optimizer, strategy.rehearse or config.epochs)
    if buffer is not None and config.buffer.replay != "draw":
        strategy = strategy._replace(draws=0)

    def train_step(**options: Any) -> Any:
        parts = {"strategy": strategy, "buffer": buffer if strategy.draws else None, "schedule": schedule} | options
        return make_train_step(
            mesh,
            model,
            optimizer=optimizer,
            augment=augment,
            seed=config.seed if seeds is None else tuple(seeds),
            classes=scenario.class_table,
            loss_classes=d.loss_classes,
            **parts,
        )

    def finetune(config: ConfigDict, state: TrainState, task: int) -> data.Loader | None:
        assert state.buffer is not None
        memory = memory_rows(config, train, state.buffer, mesh.size)
        return finetune_batches(config, train, memory, task, mesh.size)

    review = None
    if strategy.rehearse:
        step = train_step(learn=True)
        review = Review(step, lambda config, state, task: blank_batches(strategy, buffer, train, mesh, state), True)
    elif buffer is not None and config.finetune.epochs:
        _check_names("finetune.frozen", config.finetune.frozen, new_weights)
        constant = optax.constant_schedule(config.finetune.learning_rate or config.optimizer.learning_rate)
        options = {"strategy": strategy._replace(draws=0), "buffer": None, "schedule": constant}
        step = train_step(**options, frozen=tuple(config.finetune.frozen), tuning=True)
        review = Review(step, finetune, False)

    store_exemplars = None
    if buffer is not None and strategy.selection:
        store_exemplars = make_store_exemplars(
            mesh,
            model,
            strategy,
            buffer,
            augment,
            normalize,
            train,
            scenario.class_table,
            selection_of(config, strategy, buffer),
            batch_size=config.eval.batch_size,
        )

    return Experiment(
        mesh=mesh,
        strategy=strategy,
        train=train,
        test=test,
        scenario=scenario,
        buffer=buffer,
        new_weights=new_weights,
        train_step=train_step(learn=not strategy.rehearse),
        review=review,
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


def rows_of_task(run: Experiment, task: int) -> np.ndarray:
    """The rows of the train source that a task trains on."""
    return run.strategy.rows(run.scenario, task)


def train_batches(
    config: ConfigDict, run: Experiment, task: int, state: TrainState | None = None
) -> data.Loader | None:
    """Batches of the rows a task trains on; None where there are none. With the `state` in which it begins, or its like,
    those of the memory are among them if they are appended."""
    rows, memory, part = rows_of_task(run, task), np.zeros(0, np.int64), 1
    if not len(rows):
        return None
    if state is not None and state.buffer is not None and config.buffer.replay != "draw":
        memory = memory_rows(config, run.train, state.buffer, run.mesh.size)
        part = choices(config, run.mesh.size) if config.buffer.replay == "append_part" else 1
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
        memory=memory,
        part=part,
    )


def eval_batches(config: ConfigDict, run: Experiment) -> data.Loader:
    return data.eval_batches(
        run.test,
        np.concatenate([task.test for task in run.scenario.tasks]),
        batch_size=config.eval.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.threads,
    )


def task_batches(config: ConfigDict, run: Experiment, task: int) -> data.Loader:
    """The rows of a task once, for the pass at its end."""
    return data.eval_batches(
        run.train,
        rows_of_task(run, task),
        batch_size=config.eval.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.threads,
    )


def blank_batches(
    strategy: Strategy, buffer: Buffer | None, source: data.Source, mesh: jax.sharding.Mesh, state: TrainState
) -> data.Loader:
    """The batches of a training on the buffer alone, one row a device and not valid: `Strategy.rehearse` passes over it."""
    assert buffer is not None and state.buffer is not None
    return data.blank_batches(
        source,
        batch_size=mesh.size,
        steps_per_epoch=-(-buffer.stats(state.buffer)["rows"] // buffer.representatives),
        epochs=strategy.rehearse,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def strategy_of(config: ConfigDict) -> Strategy:
    """The strategy of a run, with the selection that the config chooses."""
    strategy = make_strategy(config.strategy, config.strategies.get(config.strategy, {}))
    return strategy._replace(selection=config.buffer.selection.by or strategy.selection)


def policy_of(config: ConfigDict, strategy: Strategy) -> str:
    """Of the buffer: rows that are selected at a task's end are stored in rank order."""
    return "herding" if strategy.selection else config.buffer.policy


def selection_of(config: ConfigDict, strategy: Strategy, buffer: Buffer) -> Selection:
    chosen = config.buffer.selection
    return Selection(
        by=strategy.selection,
        features=chosen.features,
        random_keys=chosen.random_keys,
        quota=chosen.quota,
        ways=chosen.ways,
        memory=config.buffer.memory,
        capacity=buffer.capacity,
    )


def capacity_of(config: ConfigDict, scenario: data.Scenario) -> int:
    """Rows of the memory."""
    if config.share is None:
        return config.capacity
    return round(config.share * sum(len(task.train) for task in scenario.tasks))


def _record(model: Model, strategy: Strategy, source: data.Source) -> Any:
    """Shapes and dtypes of one record of the strategy."""

    def record(image: jax.Array, target: dict[str, jax.Array]) -> Any:
        return strategy.stored(image, _outputs(model, image) if strategy.stores_outputs else {}, target)

    target = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in source.targets.items()}
    rows = jax.eval_shape(record, jax.ShapeDtypeStruct((1, *source.image_shape), np.uint8), target)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)


def _check_names(field: str, names: Sequence[str], new_weights: Callable[[jax.Array], Any]) -> None:
    """Whether the model has parts of these names.

    Raises:
      UserError: it has not.
    """
    parts = jax.eval_shape(new_weights, jax.random.key(0))[0]
    for name in names:
        if name not in parts:
            raise UserError(f"{field}: {name!r} is no part of the model; choose from {', '.join(parts)}")


def _outputs(model: Model, image: jax.Array) -> dict[str, jax.Array]:
    """What a new model makes of images, for the shapes."""
    _, h, w, channels = image.shape
    variables = model.init(jax.random.key(0), (h, w, channels))
    return model.apply(**variables, images=image.astype(np.float32), train=False)[0]


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
