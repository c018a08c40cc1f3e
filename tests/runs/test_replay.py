"""The memory as a data set: appended to a task's rows, or trained on alone at a task's end."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from jaxcl.data import array_source, train_batches
from jaxcl.errors import Preempted, UserError
from jaxcl.search.seeds import train_seeds
from jaxcl.strategies import make_strategy
from jaxcl.training.batches import at_one_place, draws_per_epoch, finetune_batches, memory_rows
from jaxcl.training.build import build, selection_of
from jaxcl.training.loop import train_and_evaluate
from tests.rig import SHAPE, K, Rig, make_batch
from tests.runs.test_seeds import assert_close_runs
from tests.whole import assert_same_run, last, small, stop_at

LABELS = np.arange(60, dtype=np.int32) % 6
SOURCE = array_source(np.zeros((60, *SHAPE), np.uint8), LABELS, [str(k) for k in range(6)])


def config_of(**changes):
    """Everything at once: herding from augmented images by two ways, appending, and fine-tuning of the head. Of three tasks
    of two classes: the memory is shared evenly by classes, ways and devices."""
    options = {
        "strategy": "er",
        "data__augment": ("crop",),
        "buffer__capacity": 24,
        "buffer__selection__by": "icarl",
        "buffer__selection__features": "augmented",
        "buffer__selection__random_keys": "per_shard",
        "buffer__selection__ways": 2,
        "buffer__replay": "append_part",
        "finetune__epochs": 2,
        "finetune__learning_rate": 0.05,
        "finetune__frozen": ("Dense_0",),
    }
    config = small(**(options | changes))
    with config.ignore_type():
        config.data.tasks = ((0, 1), (2, 3), (4, 5))
    return config


def rows_of(loader, epoch):
    """The ids of an epoch, padding left out."""
    begin = epoch * loader.steps_per_epoch
    ids = np.concatenate([loader[begin + t]["id"] for t in range(loader.steps_per_epoch)])
    return ids[ids >= 0]


def test_the_memory_joins_every_epoch():
    """With part = 4 one of each four neighbours comes, each with probability 1/4: in 400 epochs the counts of 12 rows are
    within 5 deviations of 100, which a right law misses once in 100,000 seeds."""
    task, memory = np.arange(20), np.array([30, 31, 31, 32, 40, 41, 42, 43, 50, 51, 52, 53, 59])
    make = functools.partial(train_batches, SOURCE, task, batch_size=8, seed=(0, 1), memory=memory)
    whole = make(epochs=3)
    for epoch in range(3):
        assert sorted(rows_of(whole, epoch)) == sorted([*task, *memory])
    assert (rows_of(whole, 0) != rows_of(whole, 1)).any()
    part, count = make(epochs=400, part=4), np.zeros(60, int)
    assert part.rows_per_epoch == 20 + 4
    for epoch in range(400):
        replayed = sorted(row for row in rows_of(part, epoch) if row >= 20)
        assert len(replayed) == 4 and 30 <= replayed[0] <= 32 < replayed[1] <= 43 < replayed[2] <= 53 < replayed[3]
        np.add.at(count, replayed, 1)
    assert count[31] + count[30] + count[32] == 400 and (np.abs(count[[30, 40, 43, 50, 53]] - 100) < 5 * 8.7).all()


def test_all_ranks_walk_through_the_same_rows():
    """Class by class; of one memory every batch holds the same rows once for each rank, of several memories their rows."""
    config = small(batch_size=8, finetune__epochs=2, finetune__order="sequential")
    memory = np.array([0, 6, 12, 1, 7, 13, 2])
    loader = finetune_batches(config, SOURCE, memory, 1, 4)
    assert rows_of(loader, 0).tolist() == [0, 6] * 4 + [12, 1] * 4 + [7, 13] * 4 + [2] * 4
    assert rows_of(loader, 1).tolist() == rows_of(loader, 0).tolist() and len(loader) == 8
    config.finetune.ranks = 1
    assert rows_of(finetune_batches(config, SOURCE, memory, 1, 4), 0).tolist() == memory.tolist()
    config.finetune.ranks, config.buffer.memory = None, "independent"
    assert rows_of(finetune_batches(config, SOURCE, memory, 1, 4), 0).tolist() == memory.tolist()
    config.finetune.order = "shuffled"
    shuffled = finetune_batches(config, SOURCE, memory, 1, 4)
    assert sorted(rows_of(shuffled, 0)) == sorted(memory) and rows_of(shuffled, 0).tolist() != memory.tolist()
    assert finetune_batches(config, SOURCE, memory, 0, 4) is None
    assert at_one_place(memory, 3, 1).tolist() == memory.tolist()


@pytest.mark.parametrize("devices", [1, 4])
def test_frozen_parts_stay_as_they_are(devices, mesh_of):
    rig = Rig(mesh_of(devices), make_strategy("incremental"), frozen=("Dense_0",))
    before = rig.new_weights(jax.random.key(0))[0]
    after = rig.step(rig.state(), rig.rows(make_batch(0)))[0].params
    np.testing.assert_array_equal(after["Dense_0"]["kernel"], before["Dense_0"]["kernel"])
    assert (np.asarray(after["head"]["kernel"]) != before["head"]["kernel"]).any()


def test_draws_are_counted():
    config = small(batch_size=16, buffer__representatives=8)
    run = build(config, jax.devices()[:4])
    count = functools.partial(draws_per_epoch, config, run.buffer)
    assert count([2, 2, 1, 1], 10) == 60 and count([5, 5, 5, 5], 10) == 80
    config.buffer.memory = "independent"
    assert count([5, 5, 1, 1], 10) == 10 * (2 + 2 + 1 + 1)
    config.buffer.replay = "append_part"
    assert count([5, 5, 5, 3], 10) == 5
    config.buffer.replay = "append"
    assert count([5, 5, 5, 5], 10) == 20
    config.buffer.memory = "replicated"
    assert count([5, 5, 5, 5], 10) == 5


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A whole run on two devices, not interrupted."""
    folder = tmp_path_factory.mktemp("alone")
    result = train_and_evaluate(config_of(), folder, devices=jax.devices()[:2], progress=False)
    return folder, result


def test_a_run_tells_what_it_replayed(alone):
    """Two ways of 12 rows: none before the first task, then half of 24 an epoch; 24 in a fine-tuning; classes in balance."""
    _, result = alone
    assert result["replay"] == {
        "form": "append_part",
        "draws_per_epoch": [0, 12, 12],
        "finetune_rows_per_epoch": [24, 24],
    }
    assert result["buffer"]["class_histogram"] == [4] * 6 + [0] * 4
    rows = [len(task.train) for task in build(config_of(), jax.devices()[:2]).scenario.tasks]
    assert result["images"] == sum(rows) + 24
    assert result["steps"] == sum(-(-(n + m) // 16) for n, m in zip(rows, (0, 12, 12), strict=True)) + 2 * 2 * 2


def test_on_one_device_it_is_the_same_run(alone, tmp_path):
    folder, result = alone
    other = train_and_evaluate(config_of(), tmp_path, devices=jax.devices()[:1], progress=False)
    held = [sorted(last(path)[1]["buffer.id"]) for path in (folder, tmp_path)]
    assert held[0] == held[1] and other["replay"] == result["replay"]
    np.testing.assert_allclose(other["accuracy_matrix"], result["accuracy_matrix"], atol=0.01)


def test_interrupted_in_a_fine_tuning_it_ends_as_if_it_had_not_been(alone, tmp_path, monkeypatch):
    """Stopped within the second task, in its fine-tuning, and in that of the last task."""
    folder, _ = alone
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = [row["step"] for row in rows if row["kind"] == "evaluation"]
    stop_at(monkeypatch, (ends[0] + 3, ends[1] - 3, ends[2] - 2))
    for _ in range(3):
        with pytest.raises(Preempted):
            train_and_evaluate(config_of(), tmp_path, devices=jax.devices()[:2], progress=False)
    train_and_evaluate(config_of(), tmp_path, devices=jax.devices()[:2], progress=False)
    assert_same_run(folder, tmp_path)


def test_seeds_together_are_what_they_are_alone(tmp_path, monkeypatch):
    """One of the two seeds alone, the other only beside it, stopped in a fine-tuning."""
    config, folders = config_of(), {seed: tmp_path / f"seed_{seed}" for seed in (0, 1)}
    stop_at(monkeypatch, (39,))
    with pytest.raises(Preempted):
        train_seeds(config, folders, devices=jax.devices()[:2], progress=False)
    assert last(folders[0])[0]["rehearsing"]
    train_seeds(config, folders, devices=jax.devices()[:2], progress=False)
    train_and_evaluate(config, tmp_path / "alone", devices=jax.devices()[:2], progress=False)
    assert_close_runs(folders[0], tmp_path / "alone")


def test_mistakes_cost_one_line():
    for changes, message in (
        (
            {"strategy": "der"},
            r"buffer\.replay: append_part is not allowed with der, .*choose one of dytox, er, icarl, sharp, wa",
        ),
        ({"strategy": "der", "buffer__replay": "draw"}, r"finetune\.epochs: 2 is not allowed with der"),
        ({"buffer__selection__by": None}, r"buffer\.replay: append_part needs a memory .* give buffer\.selection\.by"),
        ({"buffer__replay": "add"}, r"buffer\.replay: 'add' is not allowed, give one of draw"),
        ({"buffer__selection__by": "nearest"}, r"buffer\.selection\.by: 'nearest' is not allowed, give one of random"),
        (
            {"buffer__selection__random_keys": "own"},
            r"buffer\.selection\.random_keys: 'own' is not allowed, give one of shared",
        ),
        ({"buffer__memory": "independent"}, r"buffer\.selection\.ways: 2 is not allowed with .*independent"),
        ({"buffer__tier": "host"}, r"buffer\.tier: host is not allowed with rows selected"),
        ({"finetune__order": "sequential", "finetune__ranks": 3}, r"finetune\.ranks: 3 is not allowed, give a divisor"),
        ({"finetune__learning_rate": 0.0}, r"finetune\.learning_rate: 0\.0 is not allowed"),
        ({"finetune__frozen": ("body",)}, r"finetune\.frozen: 'body' is no part of the model; choose from Dense_0"),
    ):
        with pytest.raises(UserError, match=message):
            build(config_of(**changes), jax.devices()[:1])


def test_memory_rows_count_a_replicated_memory_once(mesh_of):
    rig = Rig(mesh_of(2), make_strategy("er"), memory={"memory": "replicated"})
    config = small(buffer__memory="replicated")
    state, _ = rig.step(rig.state(), rig.rows(make_batch(0)))
    source = array_source(np.zeros((16, *SHAPE), np.uint8), np.arange(16) % K, [str(k) for k in range(K)])
    found = memory_rows(config, source, state.buffer, 2)
    assert sorted(found) == np.flatnonzero(make_batch(0)["valid"]).tolist()
    assert (np.diff(np.arange(16)[found] % K) >= 0).all()


def test_the_selection_is_the_config_s():
    """Every field of `buffer.selection` reaches the selection of a run."""
    config = config_of(buffer__selection__quota="fixed")
    run = build(config, jax.devices()[:1])
    assert run.buffer is not None
    found = dataclasses.asdict(selection_of(config, run.strategy, run.buffer))
    assert found == {**config.buffer.selection.to_dict(), "memory": "sharded", "capacity": 24}
