"""The exemplars of a task: which rows enter the memory at its end, in every mode, on any number of devices."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from jaxcl.data import array_source, make_augment, make_normalize
from jaxcl.errors import UserError
from jaxcl.strategies import make_strategy
from jaxcl.training.exemplars import Selection, make_store_exemplars
from tests.rig import CLASSES, SHAPE, K, Rig, make_batch
from tests.unit.test_buffer_policies import expected_order

CAPACITY, PER_CLASS = 48, 26  # 48 is shared evenly by 4 devices and 2, 4 or 6 classes
KEY = jax.random.key(7)


def union(held):
    """What all devices hold, copies included, sorted."""
    return sorted(itertools.chain(*held))


class Tasks:
    """A rig whose memory is filled at the ends of tasks, each of which leaves another model; and what an oracle would keep."""

    def __init__(self, mesh, by, *, memory="sharded", capacity=CAPACITY, **options):
        policy = {"policy": "herding", "num_classes": K, "memory": memory}
        self.rig = Rig(mesh, make_strategy("er")._replace(selection=by), capacity=capacity, memory=policy)
        rng = np.random.default_rng(3)
        self.labels = rng.permutation(np.arange(K).repeat(PER_CLASS)).astype(np.int32)
        self.images = rng.integers(0, 256, (len(self.labels), *SHAPE)).astype(np.uint8)
        self.normalize, self.augment = make_normalize(SHAPE), make_augment(("crop", "flip"), SHAPE)
        self.selection = Selection(by, memory=memory, capacity=capacity, **options)
        source = array_source(self.images, self.labels, [str(k) for k in range(K)])
        bound = dataclasses.replace(self.rig.bound, augment=self.augment)
        self.store = make_store_exemplars(bound, source, self.selection, batch_size=8)

    def batches(self, task, size=8):
        """The task's rows in batches with padding at the end, as the loader makes them."""
        ids = np.flatnonzero(CLASSES[task][self.labels])
        for begin in range(0, len(ids), size):
            ident = np.full(size, -1, np.int32)
            part = ids[begin : begin + size]
            ident[: len(part)] = part
            yield {"image": self.images[ident], "label": self.labels[ident], "id": ident, "valid": ident >= 0}

    def states(self):
        """The state after each task, and the ids that each device holds, sorted."""
        state = None
        for task in range(len(CLASSES)):
            weights = self.rig.new_weights(jax.random.key(task))[0]
            state = self.rig.state(params=weights) if state is None else dataclasses.replace(state, params=weights)
            state = self.store(state, task, jax.random.fold_in(KEY, task), functools.partial(self.batches, task))
            held = np.asarray(state.buffer.id).reshape(self.rig.mesh.size, -1)
            yield state, [sorted(row[row >= 0].tolist()) for row in held]

    def ranked(self, task, key=None):
        """class -> ids of the task's rows, best first, by the oracle; of images augmented with `key` if one is given."""
        images = self.normalize(self.images)
        if key is not None:
            images = self.augment(key, np.arange(len(self.labels), dtype=np.int32), self.images)
        weights = self.rig.new_weights(jax.random.key(task))[0]
        features = np.asarray(self.rig.model.apply(weights, {}, images, train=False)[0]["features"])
        rows = {k: np.flatnonzero(self.labels == k) for k in np.flatnonzero(CLASSES[task])}
        return {k: mine[expected_order(self.selection.by, features[mine], PER_CLASS)] for k, mine in rows.items()}


@pytest.mark.parametrize("by", ["icarl", *(pytest.param(by, marks=pytest.mark.slow) for by in ("closest", "furthest"))])
@pytest.mark.parametrize("devices,memory", [(1, "sharded"), (4, "sharded"), (4, "replicated"), (4, "independent")])
def test_the_memory_holds_the_best_of_every_class(by, devices, memory, mesh_of):
    """After each task: of each class seen the first 48 / (classes seen) rows of the oracle's choice from all rows. Of clean
    features all devices' choices are one."""
    tasks, best = Tasks(mesh_of(devices), by, memory=memory, random_keys="per_shard"), {}
    state = None
    for task, (state, held) in enumerate(tasks.states()):  # noqa: B007
        best |= tasks.ranked(task)
        expected = sorted(np.concatenate([order[: CAPACITY // len(best)] for order in best.values()]).tolist())
        assert all(one == expected for one in ([union(held)] if memory == "sharded" else held))
        if memory == "sharded":
            assert {len(one) for one in held} == {CAPACITY // devices}
    np.testing.assert_array_equal(state.buffer.label, tasks.labels[state.buffer.id])
    np.testing.assert_array_equal(state.buffer.record["image"], tasks.images[state.buffer.id])


@pytest.mark.parametrize("keys", ["shared", "per_shard"])
def test_devices_that_choose_by_augmented_features_choose_apart_if_their_keys_do(keys, mesh_of):
    """An independent memory of 4 devices against the oracle, and against 4 ways of one device with the same total."""
    apart = Tasks(mesh_of(4), "icarl", memory="independent", capacity=12, features="augmented", random_keys=keys)
    alone = Tasks(mesh_of(1), "icarl", capacity=48, ways=4, features="augmented", random_keys=keys)
    best = [{} for _ in range(4)]
    for task, ((state, held), (_, (emulated,))) in enumerate(zip(apart.states(), alone.states(), strict=True)):
        key = jax.random.fold_in(KEY, task)
        for device in range(4):
            own = jax.random.fold_in(key, device) if keys == "per_shard" else key
            best[device] |= apart.ranked(task, own)
            expected = [order[: 12 // len(best[device])] for order in best[device].values()]
            assert held[device] == sorted(np.concatenate(expected).tolist())
        assert emulated == union(held)
        overlap = apart.rig.buffer.stats(state.buffer)["overlap"]
        assert overlap == 1 if keys == "shared" else 0 < overlap < 0.9


@pytest.mark.parametrize("memory,ways", [("sharded", 1), ("sharded", 4), ("independent", 1)])
def test_random_rows_are_a_sample_without_replacement_of_each_choice(memory, ways, mesh_of):
    """A sharded memory holds the same rows on 1 device and on 4. One choice takes no row twice; 4 choices of 2 of the 26 rows
    of each of 6 classes meet with probability 0.998."""
    capacity = CAPACITY if memory == "sharded" else CAPACITY // 4
    found = [
        list(
            Tasks(mesh_of(n), "random", memory=memory, capacity=capacity, ways=ways, random_keys="per_shard").states()
        )[-1][1]
        for n in ((1, 4) if memory == "sharded" else (4,))
    ]
    rows = [union(held) for held in found]
    assert all(one == rows[0] for one in rows) and len(rows[0]) == CAPACITY
    assert (len(set(rows[0])) < CAPACITY) == (memory == "independent" or ways > 1)
    assert len(set(rows[0])) > CAPACITY // 2  # choices differ
    if memory == "independent":
        assert all(len(set(held)) == len(held) for held in found[0])


def test_a_fixed_quota_leaves_room_for_the_classes_to_come(mesh_of):
    tasks, best = Tasks(mesh_of(4), "closest", capacity=27, quota="fixed"), {}
    for task, (_, held) in enumerate(tasks.states()):
        best |= tasks.ranked(task)
        assert union(held) == sorted(np.concatenate([order[:4] for order in best.values()]).tolist())
        assert max(map(len, held)) - min(map(len, held)) <= 1
    with pytest.raises(
        UserError, match=r"buffer\.capacity: 11 rows are less than one for each of 6 classes and 2 ways"
    ):
        Tasks(mesh_of(1), "closest", capacity=11, quota="fixed", ways=2)


def test_no_row_enters_while_a_task_lasts(mesh_of):
    rig = Rig(mesh_of(2), make_strategy("icarl"), memory={"policy": "herding", "num_classes": K})
    state, _ = rig.step(rig.state(), rig.rows(make_batch(0)))
    assert rig.buffer.stats(state.buffer)["rows"] == 0
