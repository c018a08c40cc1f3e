"""The parts of a run, put together from its config: data, model, strategy, buffer and the functions over the mesh."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from jaxcl import data
from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Buffer, make_buffer
from jaxcl.buffer.host import Store
from jaxcl.check import refused
from jaxcl.errors import UserError
from jaxcl.models import parts_named
from jaxcl.optimizer import make_optimizer, make_schedule, numbers_of
from jaxcl.partition import Layout
from jaxcl.registry import short
from jaxcl.strategies import STRATEGIES, Strategy, make_strategy, number_options
from jaxcl.training.class_means import make_class_means
from jaxcl.training.config import check_config, means_asked, prior_of
from jaxcl.training.end_task import make_end_task
from jaxcl.training.evaluate import make_evaluate
from jaxcl.training.exemplars import Selection, make_store_exemplars
from jaxcl.training.given import Numbers
from jaxcl.training.large_batch import epochs_of, longer, optimizer_of
from jaxcl.training.layout import layout_of, mesh_of, squares_of
from jaxcl.training.learn import Bound
from jaxcl.training.many import ManySteps, choose_many_steps
from jaxcl.training.network import Network, fitted, make_network
from jaxcl.training.objective import check_apart, check_objective, stored_row
from jaxcl.training.sizes import check_sizes, check_steps, check_tasks
from jaxcl.training.state import TrainState, initial_state, make_strategy_state, make_weights
from jaxcl.training.step import TrainStep, make_train_step
from jaxcl.types import PyTree

_log = logging.getLogger("jaxcl")


@dataclasses.dataclass(frozen=True)
class Review:
    """A second phase of every task, on the memory alone: `Strategy.rehearse` or `config.finetune`.

    Attributes:
      step: see `make_train_step`.
      renews_weights: whether it trains new weights; else only the optimiser's state is new, as it is for the next task.
    """

    step: TrainStep
    renews_weights: bool


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run, built and checked; nothing is compiled yet.

    Attributes:
      mesh: the devices.
      layout: how weights lie on them; None: whole on every device.
      strategy: with the selection that the config asks for.
      image_shape: (H, W, C) of the data's images.
      train, test, scenario: the rows, images or activations, and the tasks that number them.
      buffer: None for a strategy without one.
      prior: `loss.prior` as it applies.
      network: see `make_network`.
      new_state: `(weights) -> state` before the first step, see `initial_state`.
      new_weights, new_strategy_state, train_step, evaluate: made by the functions called `make_` and that name.
      many_steps: calls of many steps over a task's own rows; None where a call takes one.
      review: None for a task of one phase.
      store_exemplars: made likewise; None where rows enter the memory as they arrive.
      end_task: made likewise; None where the strategy does nothing then.
      class_means: made likewise; None where no metric asks for them.
    """

    mesh: jax.sharding.Mesh
    layout: Layout | None
    strategy: Strategy
    image_shape: tuple[int, int, int]
    train: data.Source
    test: data.Source
    scenario: data.Scenario
    buffer: Buffer | None
    prior: str
    network: Network
    new_weights: Callable[[jax.Array], tuple[PyTree, PyTree, PyTree]]
    new_strategy_state: Callable[[PyTree, PyTree], PyTree]
    new_state: Callable[[tuple[PyTree, PyTree, PyTree]], TrainState]
    train_step: TrainStep
    many_steps: ManySteps | None
    review: Review | None
    store_exemplars: Callable | None
    end_task: Callable | None
    evaluate: Callable
    class_means: Callable | None = None

    @property
    def shards(self) -> int:
        """Parts that rows are split into."""
        return mesh_lib.row_shards(self.mesh)

    @property
    def host(self) -> Store | None:
        """The rows in host memory, where the buffer keeps them there."""
        return None if self.buffer is None else self.buffer.host


def build(
    config: ConfigDict,
    devices: Sequence[jax.Device] | None = None,
    seeds: Sequence[int] | None = None,
    given: tuple[data.Source, data.Source] | None = None,
) -> Parts:
    """Puts a run together from its config; with `seeds`, several runs whose steps and evaluations are made as one; with `given`
    train and test sources, on these.

    Raises:
      UserError: one line on what is wrong with the config or its data.
    """
    check_config(config, len(jax.devices() if devices is None else devices))
    mesh = mesh_of(config, devices)
    if config.batch_size % jax.process_count():
        raise UserError(f"batch_size: {config.batch_size} is not a multiple of {jax.process_count()} processes")
    d, strategy = config.data, strategy_of(config)
    scenario, train, test = make_tasks(config, given)
    rows = [len(task.train) for task in scenario.tasks]
    for field, epochs in (("epochs", epochs_of(config)), ("finetune.epochs", config.finetune.epochs)):
        check_steps(field, epochs, rows, config.batch_size)
    image_shape = train.image_shape
    network = make_network(config, mesh, train, test, scenario.class_table)
    if network.model.fits is not None:
        network.model.fits(config.batch_size)
    train, test = network.train, network.test
    strategy = fitted(strategy, network)
    check_objective(config, strategy, network, train)
    check_apart(config, mesh, network)
    layout = layout_of(config, mesh, network.model, strategy, network.image_shape)
    optimizer = make_optimizer(config.optimizer, squares=squares_of(layout))
    loaded = None if network.loaded is None else network.loaded.tensors
    new_weights = make_weights(mesh, network.model, optimizer, network.image_shape, loaded, layout, strategy.begin)
    row = stored_row(network, strategy, train) if strategy.draws else None
    capacity = capacity_of(config.buffer, scenario)
    averaged = config.optimizer.average > 0
    sizes: Any = {"record": row, "capacity": capacity, "draws": strategy.draws, "seeds": len(seeds or [0])}
    own = jax.eval_shape(lambda key: strategy.init(*new_weights(key)[:2]), jax.random.key(0))
    sizes |= {"averaged": averaged, "own": own, "layout": layout}
    check_sizes(config, mesh, new_weights, train.image_shape, **sizes)
    buffer = _make_buffer(config, mesh, strategy, row, capacity, train) if strategy.draws else None
    prior = prior_of(config, strategy)
    if prior != config.loss.prior and strategy.own_bias:
        _log.info("loss.prior = %s leaves %s as it is: it %s", config.loss.prior, config.strategy, strategy.own_bias)
    if buffer is not None and config.buffer.replay != "draw":  # the memory's rows come among the task's own
        strategy = strategy._replace(draws=0)
    bound = Bound(
        mesh,
        network.model,
        strategy,
        buffer,
        optimizer,
        schedule_of(config, strategy),
        network.augment,
        network.normalize,
        scenario.class_table,
        frozen=network.frozen,
        scales=network.scales,
        loss_classes=d.loss_classes,
        prior=prior,
        replay_weight=config.loss.replay_weight,
        later_tasks=config.optimizer.later_tasks,
        average=config.optimizer.average,
        batch_size=config.batch_size,
        noise=config.optimizer.noise_scale,
        task_of_row=scenario.task_of_train_row if network.model.reads else None,
        layout=layout,
        codec=network.codec,
        microbatches=config.microbatches,
        numbers=config_numbers(config),
        rebind=functools.partial(with_numbers, config, network),
    )
    store_exemplars = None
    if buffer is not None and strategy.selection:
        selection = selection_of(config, strategy, buffer)
        store_exemplars = make_store_exemplars(bound, train, selection, batch_size=config.eval.batch_size)
    counted = None if prior == "none" else train.num_classes
    stepping = dataclasses.replace(bound, buffer=buffer if strategy.draws else None)
    seed = config.seed if seeds is None else tuple(seeds)
    training = dataclasses.replace(stepping, learn=not strategy.rehearse and strategy.learns != "none")
    return Parts(
        mesh=mesh,
        layout=layout,
        strategy=strategy,
        image_shape=image_shape,
        train=train,
        test=test,
        scenario=scenario,
        buffer=buffer,
        prior=prior,
        network=network,
        new_weights=new_weights,
        new_strategy_state=make_strategy_state(mesh, strategy, layout),
        new_state=functools.partial(
            initial_state,
            mesh,
            buffer=buffer,
            strategy=strategy,
            counted_classes=counted,
            averaged=averaged,
            layout=layout,
        ),
        train_step=make_train_step(training, seed),
        many_steps=choose_many_steps(config, training, seed, train, scenario),
        review=None if buffer is None else _make_review(config, stepping, seed, new_weights),
        store_exemplars=store_exemplars,
        end_task=None if strategy.end_task is None else make_end_task(bound),
        evaluate=make_evaluate(
            bound,
            scenario.task_of_test_row,
            seeds=seeds is not None,
            reconstructs=bool(train.targets),
            metrics=tuple(config.eval.metrics),
        ),
        class_means=make_class_means(bound, seeds=seeds is not None) if means_asked(config) else None,
    )


def make_tasks(
    config: ConfigDict, given: tuple[data.Source, data.Source] | None = None
) -> tuple[data.Scenario, data.Source, data.Source]:
    """The tasks of a run, and the train and test rows that they number; with `data.validation`, validation rows for test.

    Raises:
      UserError: one line on what is wrong with the data or its split.
    """
    d = config.data
    train, test = given or data.open_source(d.source, d.data_dir, image_size=d.image_size)
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


def strategy_of(config: ConfigDict) -> Strategy:
    """The strategy of a run, with the selection that the config chooses."""
    strategy = make_strategy(config.strategy, config.strategies.get(short(config.strategy), {}))
    return strategy._replace(selection=config.buffer.selection.by or strategy.selection)


def config_numbers(config: ConfigDict) -> dict[str, float]:
    """The numbers of a config by which runs may differ that share their programs, by the field."""
    found = {f"optimizer.{name}": x for name, x in numbers_of(optimizer_of(config)).items()}
    found["finetune.learning_rate"] = config.finetune.learning_rate or optimizer_of(config).learning_rate
    options = STRATEGIES.options(config.strategy) | dict(config.strategies.get(short(config.strategy), {}))
    return found | {f"strategy.{name}": options[name] for name in number_options(config.strategy)}


def schedule_of(
    config: ConfigDict, strategy: Strategy, numbers: Numbers | None = None
) -> Callable[[jax.Array], jax.Array]:
    """The learning rate by the epoch within a task; `numbers`: see `make_optimizer`."""
    if strategy.rehearse:
        return make_schedule(optimizer_of(config), strategy.rehearse, numbers)
    schedule, times = make_schedule(optimizer_of(config), config.epochs, numbers), longer(config)
    return schedule if times == 1 else lambda epoch: schedule(epoch / times)


def with_numbers(config: ConfigDict, network: Network, bound: Bound, numbers: Numbers) -> Bound:
    """The same with these numbers, traced or not, in place of those of the config."""

    def group(name: str) -> dict[str, Any]:
        return {field.removeprefix(name): x for field, x in numbers.items() if field.startswith(name)}

    optimizer, given = config.optimizer, config.strategies.get(short(config.strategy), {})
    strategy = bound.strategy
    if group("strategy."):
        strategy = fitted(make_strategy(config.strategy, {**given, **group("strategy.")}), network)
    schedule = schedule_of(config, strategy, group("optimizer."))
    return dataclasses.replace(
        bound,
        strategy=strategy._replace(selection=bound.strategy.selection, draws=bound.strategy.draws),
        optimizer=make_optimizer(optimizer, group("optimizer."), squares_of(bound.layout)),
        schedule=optax.constant_schedule(numbers["finetune.learning_rate"]) if bound.tuning else schedule,
    )


def policy_of(config: ConfigDict, strategy: Strategy) -> str:
    """Of the buffer: rows that are selected at a task's end are stored in rank order."""
    return "herding" if strategy.selection else config.buffer.policy


def capacity_of(config: ConfigDict, scenario: data.Scenario) -> int:
    """Rows of the memory; `config` is the part called buffer."""
    if config.share is None:
        return config.capacity
    return round(config.share * sum(len(task.train) for task in scenario.tasks))


def selection_of(config: ConfigDict, strategy: Strategy, buffer: Buffer) -> Selection:
    """How exemplars are chosen, with the memory they are for.

    Raises:
      UserError: there are more ways than rows, which the share alone does not tell.
    """
    if config.buffer.selection.ways > buffer.capacity:
        held = f"at most {buffer.capacity}, the rows of buffer.share = {config.buffer.share}"
        raise refused("buffer.selection.ways", config.buffer.selection.ways, held)
    chosen = config.buffer.selection.to_dict() | {"by": strategy.selection}
    return Selection(**chosen, memory=config.buffer.memory, capacity=buffer.capacity)


def _make_buffer(
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    strategy: Strategy,
    row: PyTree,
    capacity: int,
    train: data.Source,
) -> Buffer:
    b = config.buffer
    as_named = ("representatives", "memory", "exchange", "sampling", "repeats", "tier", "path", "handover", "queue")
    return make_buffer(
        row,
        capacity=capacity,
        policy=policy_of(config, strategy),
        num_classes=train.num_classes,
        accept=b.candidates / config.batch_size,
        mesh=mesh,
        axis=mesh_lib.AXIS,
        num_ids=len(train.labels),
        count_classes=prior_of(config, strategy) != "none",
        **{name: b[name] for name in as_named},
    )


def _make_review(config: ConfigDict, bound: Bound, seed: int | Sequence[int], new_weights: Callable) -> Review | None:
    """The second phase of the tasks, if the strategy or the config asks for one.

    Raises:
      UserError: the model has no part of a name in `finetune.frozen`.
    """
    tune = config.finetune
    if bound.strategy.rehearse:
        return Review(make_train_step(bound, seed), True)
    if not tune.epochs:
        return None
    parts = jax.eval_shape(new_weights, jax.random.key(0))[0]
    frozen = dict.fromkeys((*bound.frozen, *parts_named("finetune.frozen", tune.frozen, parts)))
    own: Any = {"strategy": bound.strategy._replace(draws=0), "buffer": None, "frozen": tuple(frozen)}
    constant = optax.constant_schedule(tune.learning_rate or optimizer_of(config).learning_rate)
    return Review(make_train_step(dataclasses.replace(bound, **own, schedule=constant, tuning=True), seed), False)
