"""The average of the weights: against NumPy over those of all steps, on any number of devices, in every phase of a run."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxcl.data import class_incremental
from jaxcl.errors import Preempted, UserError
from jaxcl.strategies import make_strategy
from jaxcl.training.average import Average
from jaxcl.training.build import build
from jaxcl.training.evaluate import make_evaluate
from jaxcl.training.loop import train_and_evaluate
from tests.rig import Rig, close, make_batch, make_draw
from tests.whole import assert_same_run, last, small, stop_at

STEPS, DECAY = 7, 0.75


def averaging(rig):
    """The state without a buffer, its average far from the weights, as another task might have left it."""
    state = rig.state(stored=False)
    far = jax.tree.map(lambda x: x + 100, Average(state.params, state.batch_stats))
    return dataclasses.replace(state, average=far)


def walk(mesh, model="convnet", steps=STEPS, **options):
    """The states behind each step."""
    rig = Rig(mesh, make_strategy("er"), model, average=DECAY, **options)
    state, found = averaging(rig), []
    for i in range(steps):
        state, _ = rig.step(rig.stage(state, [make_draw(50 + i)]), rig.rows(make_batch(i)))
        found.append(jax.device_get(state))
    return found


def mean_of(trees):
    """The definition: the plain mean of the first 1 / (1 - decay) steps, the exponential one from then on."""
    mean = trees[0]
    for t, tree in enumerate(trees):
        keep = min(DECAY, t / (t + 1))
        mean = jax.tree.map(lambda m, x, k=keep: np.float64(k) * m + (1 - k) * np.float64(x), mean, tree)
    return mean


@pytest.mark.parametrize("devices", [1, 4])
def test_it_is_that_of_the_weights_and_statistics_behind_every_step(devices, mesh_of):
    states = walk(mesh_of(devices))
    for n in (1, 3, STEPS):
        trees = [(state.params, state.batch_stats) for state in states[:n]]
        close(tuple(states[n - 1].average), mean_of(trees), rtol=1e-5, atol=1e-6)
    plain = jax.tree.map(lambda *x: np.mean(x, axis=0), *[state.params for state in states[:4]])
    close(states[3].average.params, plain, rtol=1e-5, atol=1e-6)  # decay 0.75: of the first four steps the mean
    assert states[-1].batch_stats and not np.allclose(*(jax.tree.leaves(x)[0] for x in (states[-1].params, plain)))


def test_any_number_of_devices_has_the_same(mesh_of):
    one, many = (walk(mesh_of(n), steps=3)[-1].average for n in (1, 4))
    close(tuple(many), tuple(one), rtol=1e-4, atol=1e-5)


def test_it_changes_nothing_of_the_training_and_frozen_weights_are_their_own(mesh_of):
    with_it = walk(mesh_of(2), "mlp", frozen=("head",))[-1]
    rig = Rig(mesh_of(2), make_strategy("er"), "mlp", frozen=("head",))
    state = rig.state(stored=False)
    for i in range(STEPS):
        state, _ = rig.step(rig.stage(state, [make_draw(50 + i)]), rig.rows(make_batch(i)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), with_it.params)
    jax.tree.map(np.testing.assert_array_equal, with_it.average.params["head"], with_it.params["head"])
    assert state.average is None


def test_the_next_task_begins_it_anew(mesh_of):
    rig = Rig(mesh_of(2), make_strategy("incremental"), "mlp", average=DECAY)
    state = averaging(rig)
    for i in range(3):
        state, _ = rig.step(state, rig.rows(make_batch(i)))
    state, _ = rig.step(
        dataclasses.replace(state, task_step=rig.state(stored=False).task_step), rig.rows(make_batch(9))
    )
    jax.tree.map(np.testing.assert_array_equal, state.average.params, state.params)


def test_without_learning_it_stays(mesh_of):
    rig = Rig(mesh_of(2), make_strategy("gdumb"), learn=False, average=DECAY)
    state = averaging(rig)
    before = jax.device_get(state.average)
    after, _ = rig.step(rig.stage(state, [make_draw(0)]), rig.rows(make_batch(0)))
    jax.tree.map(np.testing.assert_array_equal, after.average, before)


def test_test_rows_are_judged_by_it(mesh_of):
    rig = Rig(mesh_of(2), make_strategy("incremental"), "mlp")
    other = rig.new_weights(jax.random.key(5))
    state = rig.state(stored=False)
    averaged = dataclasses.replace(state, average=Average(*other[:2]))
    assert averaged.evaluated._replace(params=0, batch_stats=0) == state.weights._replace(params=0, batch_stats=0)
    labels = make_batch(0)["label"]
    scenario = class_incremental(labels, labels, 6, 3)
    evaluate = make_evaluate(dataclasses.replace(rig.bound, classes=scenario.class_table), scenario.task_of_test_row)
    found = [
        evaluate(x, [make_batch(0) | {"valid": labels >= 0}])["confusion"].tolist()
        for x in (averaged.evaluated, dataclasses.replace(state, params=other[0]).weights, state.weights)
    ]
    assert found[0] == found[1] != found[2]


# --- whole runs -------------------------------------------------------------------------------------------------------


def final(folder):
    """The state as the last checkpoint holds it, without what is not of the model."""
    arrays = last(folder)[1]
    return {
        kind: {name.removeprefix(f"{kind}."): x for name, x in arrays.items() if name.startswith(f"{kind}.")}
        for kind in ("params", "average.params")
    }


def test_a_run_stopped_and_continued_is_the_run(tmp_path, monkeypatch):
    config = small(data__tasks=2, optimizer__average=0.9, strategy="er")
    whole = train_and_evaluate(config, tmp_path / "whole", devices=jax.devices()[:2], progress=False)
    stop_at(monkeypatch, [5, 31])
    for _ in range(2):
        with pytest.raises(Preempted):
            train_and_evaluate(config, tmp_path / "stopped", devices=jax.devices()[:2], progress=False)
    train_and_evaluate(config, tmp_path / "stopped", devices=jax.devices()[:2], progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    plain = train_and_evaluate(
        small(data__tasks=2, strategy="er"), tmp_path / "plain", devices=jax.devices()[:2], progress=False
    )
    assert whole["accuracy_matrix"] != plain["accuracy_matrix"]
    ours, theirs = final(tmp_path / "whole"), final(tmp_path / "plain")
    assert not theirs["average.params"] and ours["average.params"].keys() == ours["params"].keys()
    jax.tree.map(np.testing.assert_array_equal, ours["params"], theirs["params"])


def test_it_is_the_same_with_the_memory_on_the_host_and_restored_on_other_devices(tmp_path):
    config = small(data__tasks=2, optimizer__average=0.9, strategy="er")
    result = train_and_evaluate(config, tmp_path / "device", devices=jax.devices()[:2], progress=False)
    config.buffer.tier = "host"
    train_and_evaluate(config, tmp_path / "host", devices=jax.devices()[:2], progress=False)
    jax.tree.map(np.testing.assert_array_equal, final(tmp_path / "host"), final(tmp_path / "device"))
    config.buffer.tier = "device"
    (
        tmp_path / "device" / "result.json"
    ).unlink()  # all tasks are done: it is told anew, by the weights of the checkpoint
    again = train_and_evaluate(config, tmp_path / "device", devices=jax.devices()[:1], progress=False)
    assert [again[name] for name in ("confusion", "accuracy_in_task")] == [
        result[name] for name in ("confusion", "accuracy_in_task")
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "from_scratch"},
        {"strategy": "gdumb", "strategies__gdumb__epochs": 1},
        {"strategy": "er", "buffer__selection__by": "icarl", "finetune__epochs": 1, "finetune__frozen": ("Dense_0",)},
    ],
    ids=lambda changes: changes["strategy"],
)
def test_every_phase_begins_it_anew(changes, tmp_path):
    """A decay so near 1 that the average is the plain mean of the last phase: far from nothing that came before it."""
    config = small(data__tasks=2, optimizer__average=0.999, optimizer__learning_rate=1e-6, **changes)
    train_and_evaluate(config, tmp_path, devices=jax.devices()[:1], progress=False)
    found = final(tmp_path)
    close(found["average.params"], found["params"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["wa", "icarl", "bic"])
def test_what_the_end_of_a_task_ties_to_the_last_weights_is_refused(name):
    with pytest.raises(UserError, match=f"optimizer.average: 0.9 is not allowed, give 0: {name} .* last weights"):
        build(small(strategy=name, optimizer__average=0.9), jax.devices()[:1])
