"""One task of a run, phase by phase, for one seed or for several as one.

    train      the steps over the task's own rows
    store      exemplars enter the memory, where rows do not enter it as they arrive
    review     the steps over the memory alone, where the strategy or the config asks for them
    end        what the strategy does with a pass over rows
    evaluate   the test rows of all tasks
    save       a checkpoint; then the run stops if it was told to

`Progress` says where a continued run goes on: `iterator` in the middle of the present batches, `rehearsing` that those of the
task's own rows are done and those of the review are on.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcl import data
from jaxcl.errors import UserError
from jaxcl.runs.lanes import Lanes
from jaxcl.runs.progress import Bar
from jaxcl.runs.session import Session
from jaxcl.runs.steps import Step, take_steps
from jaxcl.training.batches import evaluation_batches, review_batches, task_batches, train_batches
from jaxcl.training.build import Parts
from jaxcl.training.end_task import Batches
from jaxcl.training.result import add_scores, count_review, count_rows
from jaxcl.training.shown import buffer_scalars, evaluation_scalars, means_so_far, seconds_scalars
from jaxcl.training.state import TrainState
from jaxcl.types import Batch, PyTree

Scores = dict[str, np.ndarray]
Untrained = tuple[PyTree, PyTree, PyTree]  # params, batch_stats, opt_state
Loaders = list[data.Loader]  # one a lane; none where there are no batches
SHARES = ("accuracy", "top5")  # scores shown in per cent
SELECTING = np.uint32(2**32 - 1)  # folded into a run's key for its selections: no step has this number


@dataclasses.dataclass
class Course:
    """What the tasks of a run share.

    Attributes:
      lanes: the seeds that go side by side.
      parts: of the run.
      step: the compiled step over a task's own rows.
      bar: shows the steps.
      review_step: the compiled step of the review, once there was one.
    """

    lanes: Lanes[TrainState]
    parts: Parts
    step: Step
    bar: Bar
    review_step: Step | None = None


def run_task(course: Course, state: TrainState, task: int) -> tuple[TrainState, list[Scores]]:
    """The state, and the scores of every lane, when the task is done."""
    own = own_batches(course.lanes, course.parts, task)
    if own:  # else the strategy trains nothing in this task
        if not course.lanes.at.rehearsing:
            state = train(course, state, task, own)
            state = store(course, state, task)
        state = review(course, state, task)
        state = end(course, state, task)
    scores = evaluate(course, state, task)
    save(course, state, task)
    return state, scores


def train(course: Course, state: TrainState, task: int, own: Loaders) -> TrainState:
    """The steps over the task's own rows, with those of the memory among them if they are appended."""
    lanes, parts = course.lanes, course.parts
    begins = lanes.at.iterator is None
    if begins and parts.strategy.fresh and task:
        state = with_weights(state, new_weights(lanes, parts, task))
    elif begins and parts.network.model.begin is not None and task:
        state = dataclasses.replace(state, params=begun(parts.network.model.begin, state.params, task))
    if lanes.configs[0].buffer.replay != "draw":
        before = len(own[0])
        own = own_batches(lanes, parts, task, state)
        course.bar.grow(len(own[0]) - before)
    if begins:
        state = begin(lanes, state, task, own)
    feed, steps_per_call = None, lanes.configs[0].steps_per_call
    if parts.many_steps is not None:
        with lanes.phases("load"):
            feed = parts.many_steps.feed(lanes, own)
    state = take_steps(lanes, course.step, state, own, course.bar, feed, steps_per_call)
    for i, session in enumerate(lanes.sessions):
        count_rows(lanes.configs[i], parts, session.progress, lanes.one(state, i), own[i])
    return state


def store(course: Course, state: TrainState, task: int) -> TrainState:
    """The task's exemplars enter the memory."""
    store_exemplars = course.parts.store_exemplars
    if store_exemplars is None:
        return state

    def one(config: ConfigDict, state: TrainState, batches: Batches) -> TrainState:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), SELECTING), task)
        return store_exemplars(state, task, key, batches)

    return _each_lane(course, task, one, state)


def review(course: Course, state: TrainState, task: int) -> TrainState:
    """The steps over the memory alone."""
    lanes, parts, at = course.lanes, course.parts, course.lanes.at
    again = _loaders(lanes, lambda config, one: review_batches(config, parts, task, one), state)
    if parts.review is None or not again:
        return state
    renew = with_weights if parts.review.renews_weights else with_optimizer
    if not at.rehearsing:
        lanes.stand(rehearsing=True, iterator=None)
        state = renew(state, new_weights(lanes, parts, task))
        state = begin(lanes, state, task, again)
    if course.review_step is None:
        with lanes.phases("compile"):
            first = lanes.batch([loader[0] for loader in again])
            course.review_step = parts.review.step.prepare(state, first, lanes.phases)
    course.bar.grow(len(again[0]) - at.batch)
    state = take_steps(lanes, course.review_step, state, again, course.bar)
    if parts.review.renews_weights:
        return state
    for session, loader in zip(lanes.sessions, again, strict=True):
        count_review(session.progress, loader)
    return with_optimizer(state, new_weights(lanes, parts, task))


def end(course: Course, state: TrainState, task: int) -> TrainState:
    """What the strategy does when all steps of the task are done."""
    end_task = course.parts.end_task
    if end_task is None:
        return state
    return _each_lane(course, task, lambda config, one, batches: end_task(one, batches), state)


def evaluate(course: Course, state: TrainState, task: int) -> list[Scores]:
    """The scores of every lane on the test rows of all tasks; into the progress, the log and the bar."""
    lanes = course.lanes
    with lanes.phases("evaluate"):
        scores = scores_of(lanes, course.parts, state)
        for session, mine in zip(lanes.sessions, scores, strict=True):
            rows = add_scores(session.progress, mine)
            session.log.write("evaluation", lanes.at.step, {"task": task, **rows})
        show(course, state, task)
    return scores


def show(course: Course, state: TrainState, task: int) -> None:
    """What is found after a task: to the writers of every lane, and to the bar as means over the lanes."""
    lanes, parts = course.lanes, course.parts
    for i, session in enumerate(lanes.sessions):
        stored = lanes.one(state, i).buffer
        stats = {} if parts.buffer is None or stored is None else parts.buffer.stats(stored)
        background = {} if parts.host is None else parts.host.seconds
        scalars = [evaluation_scalars(session.progress), buffer_scalars(stats)]
        scalars += [seconds_scalars(session.phases.seconds, background)]
        session.log.show(lanes.at.step, {name: x for found in scalars for name, x in found.items()})
    means = [means_so_far(session.progress) for session in lanes.sessions]
    found = {name: float(np.mean([mean[name] for mean in means])) for name in means[0]}
    shares = {name: f"{100 * x:.1f} %" if name in SHARES else f"{x:.4f}" for name, x in found.items()}
    course.bar.end(f"task {task + 1} of {len(parts.scenario.tasks)}", shares)


def save(course: Course, state: TrainState, task: int) -> None:
    """A checkpoint, behind which the next task begins.

    Raises:
      Preempted: the run was told to stop, and is not done.
    """
    course.lanes.stand(task=task + 1, rehearsing=False, iterator=None)
    course.lanes.save(state)
    if task + 1 < len(course.parts.scenario.tasks):
        course.lanes.stop_if_asked()


def own_batches(lanes: Lanes[TrainState], parts: Parts, task: int, state: TrainState | None = None) -> Loaders:
    """Of the task's own rows, see `train_batches`."""
    return _loaders(lanes, lambda config, one: train_batches(config, parts, task, one), state)


def new_weights(lanes: Lanes[TrainState], parts: Parts, task: int) -> Untrained:
    """Newly initialised weights of every lane, and their optimiser's state."""
    return lanes.weights([weights_of(config, parts, task) for config in lanes.configs])


def weights_of(config: ConfigDict, parts: Parts, task: int) -> Untrained:
    """The same of one seed."""
    return parts.new_weights(jax.random.fold_in(jax.random.key(config.seed), task))


def with_weights(state: TrainState, weights: Untrained) -> TrainState:
    """The state with these weights and their optimiser."""
    params, batch_stats, opt_state = weights
    return dataclasses.replace(state, params=params, batch_stats=batch_stats, opt_state=opt_state)


def with_optimizer(state: TrainState, weights: Untrained) -> TrainState:
    """The state with the optimiser of these weights alone."""
    return dataclasses.replace(state, opt_state=weights[2])


def begin(lanes: Lanes[TrainState], state: TrainState, task: int, loaders: Loaders) -> TrainState:
    """The state in which the first of these batches is taken."""
    start, per_epoch, number = (lanes.number(x) for x in (0, loaders[0].steps_per_epoch, task))
    return dataclasses.replace(state, task_step=start, steps_per_epoch=per_epoch, task=number)


def begun(change: Callable[[PyTree, jax.Array], PyTree], params: PyTree, task: int) -> PyTree:
    """What a model makes of its parameters at the beginning of a task, as these lie on the mesh."""
    where = jax.tree.map(lambda x: x.sharding, params)
    return jax.jit(change, out_shardings=where)(params, np.int32(task))


def scores_of(lanes: Lanes[TrainState], parts: Parts, state: TrainState) -> list[Scores]:
    """The scores of every lane with the weights and the memory of this state."""
    batches = evaluation_batches(lanes.configs[0], parts)
    rows = lanes.sessions[0].watched(batches.begin(0), "a batch of the evaluation")
    means = None if parts.class_means is None else parts.class_means(state.evaluated, state.buffer)
    return lanes.split(parts.evaluate(state.evaluated, rows, means))


def _loaders(lanes: Lanes[TrainState], make: Callable[..., data.Loader | None], state: TrainState | None) -> Loaders:
    """What `make(config, state)` gives for every lane."""
    states = [None if state is None else lanes.one(state, i) for i in range(len(lanes))]
    found = [make(config, one) for config, one in zip(lanes.configs, states, strict=True)]
    loaders = [loader for loader in found if loader is not None]
    if len({len(loader) for loader in loaders}) > 1:
        raise UserError("--vmap: not allowed here, as the memories of the seeds differ in size; leave it out")
    return loaders


def _each_lane(course: Course, task: int, act: Callable[..., TrainState], state: TrainState) -> TrainState:
    """`act(config, state, batches)` at a task's end, lane after lane; `batches()` gives the rows of the task once."""
    lanes = course.lanes
    with lanes.phases("end of task"):
        done = []
        for i, (config, session) in enumerate(zip(lanes.configs, lanes.sessions, strict=True)):
            loader = task_batches(config, course.parts, task)
            batches = functools.partial(_rows_at_end, session, loader)
            done.append(act(config, lanes.one(state, i), batches))
        return lanes.join(done)


def _rows_at_end(session: Session, loader: data.Loader) -> Iterator[Batch]:
    return session.watched(loader.begin(0), "a batch at a task's end")
