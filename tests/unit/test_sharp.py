"""SHARP: links, units and classes against an oracle in NumPy, what it promises of mature classes, and whole runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows, make_buffer
from jaxcl.errors import UserError
from jaxcl.mesh import ROWS, WHOLE, on_mesh
from jaxcl.models import dense_layers, make_model
from jaxcl.strategies import End, make_strategy
from jaxcl.strategies.base import recent_classes
from jaxcl.strategies.sharp import left_classes, most_active, older, rewired, some_of
from jaxcl.training.end_task import visit_batch
from jaxcl.training.loop import train_and_evaluate
from jaxcl.training.trained import load
from tests.oracle import Herding
from tests.rig import CLASSES, SHAPE, K, Rig, make_batch, make_draw
from tests.unit.test_bad_input import said
from tests.whole import assert_same_run, last, small, stop_at

LAYERS = ("Dense_0", "Dense_1", "head")
OPTIONS = {"density": 0.3, "activity": 0.5}
DECAY = optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.9))


@functools.cache
def rig_of(mesh):
    strategy = make_strategy("sharp", OPTIONS)
    memory = {"policy": "herding", "num_classes": K}
    return Rig(mesh, strategy, network={"hidden": (24, 20)}, optimizer=DECAY, memory=memory)


def end_of_task(rig, state, visited):
    """The state after the task, as `visited` activity leaves it."""
    own = jax.tree.map(jnp.asarray, state.strategy_state)
    context = rig.bound.context(own, state.task)
    params, own = rig.strategy.end_task(End(state.params, {}, visited, context))
    return dataclasses.replace(state, params=params, strategy_state=own, task=state.task + 1)


def activity(seed):
    rng = np.random.default_rng(seed)
    return {
        "Dense_0": rng.exponential(size=24).astype(np.float32),
        "Dense_1": rng.exponential(size=20).astype(np.float32),
    }


# --- the oracle --------------------------------------------------------------------------------------------------------


class Oracle:
    """What the links and ages are, one unit and one link after the other; which links grow it is told."""

    def __init__(self, links):
        self.links = {name: np.array(x) for name, x in links.items()}
        self.age = {name: [0] * self.links[name].shape[1] for name in LAYERS[:-1]}

    def end(self, visited, seen, grown):
        for name, ages in self.age.items():
            active, total, units = visited[name].astype(np.float64), 0.0, []
            while total < 0.5 * active.sum():
                units.append(max(set(range(len(active))) - set(units), key=lambda u: active[u]))
                total += active[units[-1]]
            for u, age in enumerate(ages):
                ages[u] = age + 1 if age or u in units else 0
        for below, name in zip((None, *LAYERS), LAYERS, strict=False):
            links, dropped = self.links[name], 0
            for i, j in np.argwhere(links):
                plastic = below is not None and self.age[below][i] == 0
                if plastic and (seen[j] if name == "head" else self.age[name][j] > 0):
                    links[i, j], dropped = False, dropped + 1
            if name == "head":
                continue
            places = np.argwhere(grown[name] & ~links)
            room = sum(self.age[name][j] == 0 for _, j in np.argwhere(~links))
            assert len(places) == min(dropped, room)
            assert all(self.age[name][j] == 0 for _, j in places)
            links[tuple(places.T)] = True

    def still(self, name, mature_classes):
        mature = mature_classes if name == "head" else np.array(self.age[name]) > 1
        return ~self.links[name] | mature, mature


def test_links_units_and_weights_follow_the_oracle_through_three_tasks(mesh_of):
    rig = rig_of(mesh_of(2))
    state = rig.state(stored=False)
    oracle = Oracle(state.strategy_state["links"])
    count = {name: x.sum() for name, x in oracle.links.items()}
    assert (
        count["Dense_0"] == round(0.3 * 64 * 24)
        and count["Dense_1"] == round(0.3 * 24 * 20)
        and oracle.links["head"].all()
    )
    for task in range(3):
        mature_classes = np.arange(K) < 2 * (task - 1)  # one task is remembered
        context = rig.bound.context(state.strategy_state, state.task)
        np.testing.assert_array_equal(left_classes(context, 1), mature_classes)
        before = jax.device_get(state.params)
        for step in range(3):
            draw = make_draw(10 * task + step, classes=(max(2 * task - 2, 0), max(2 * task - 1, 0)))
            state = rig.stage(state, [draw])
            state, _ = rig.step(state, rig.rows(make_batch(step, (2 * task, 2 * task + 1))))
        after = jax.device_get(state.params)
        for name in LAYERS:
            still, mature = oracle.still(name, mature_classes)
            kernel, bias = after[name]["kernel"], after[name]["bias"]
            assert (kernel[~oracle.links[name]] == 0).all()  # through momentum and decay
            np.testing.assert_array_equal(kernel[still], before[name]["kernel"][still])
            np.testing.assert_array_equal(bias[mature], before[name]["bias"][mature])
            moved = kernel != before[name]["kernel"]
            assert moved[~still].mean() > 0.5 and (bias != before[name]["bias"])[~mature].any()
        visited = activity(task)
        state = end_of_task(rig, state, visited)
        links = jax.device_get(state.strategy_state["links"])
        new = {name: links[name] & ~oracle.links[name] for name in LAYERS}
        old = {name: x.copy() for name, x in oracle.links.items()}
        oracle.end(visited, np.arange(K) < 2 * (task + 1), links)
        for name in LAYERS:
            np.testing.assert_array_equal(links[name], oracle.links[name])
            kept = old[name] & links[name]
            kernel = np.asarray(state.params[name]["kernel"])
            np.testing.assert_array_equal(kernel[kept], after[name]["kernel"][kept])
            assert (kernel[~kept] == 0).all()  # those that are gone, and those that grow
            if name != "head":
                assert links[name].sum() == count[name]
                np.testing.assert_array_equal(state.strategy_state["age"][name], oracle.age[name])
        assert not new["head"].any() and new["Dense_1"].any() and (old["Dense_1"] & ~links["Dense_1"]).any()
        assert not new["Dense_0"].any()  # the input is not plastic: nothing to drop


def test_what_a_mature_class_is_given_stays_to_the_last_bit(mesh_of):
    """Whatever is learnt later, for any input."""
    rig = rig_of(mesh_of(2))
    state, images = rig.state(stored=False), np.random.default_rng(0).random((50, *SHAPE)).astype(np.float32)

    def logits(state):
        return np.asarray(rig.model.apply(jax.device_get(state.params), {}, images, train=False)[0]["logits"])

    found = []
    for task in range(3):
        for step in range(2):
            state, _ = rig.step(state, rig.rows(make_batch(step, (2 * task, 2 * task + 1))))
        state = end_of_task(rig, state, activity(task))
        found.append(logits(state))
    np.testing.assert_array_equal(
        found[1][:, :2], found[2][:, :2]
    )  # of task 0, which left the memory when task 1 had ended
    assert (found[0][:, :2] != found[1][:, :2]).any() and (found[1][:, 2:] != found[2][:, 2:]).any(axis=0).all()


def test_activity_is_that_of_the_valid_rows_and_the_links_are_those_of_any_number_of_devices(mesh_of):
    batch, draw, links = make_batch(3), make_draw(4), []
    for devices in (1, 4):
        rig = rig_of(mesh_of(devices))
        state, _ = rig.step(rig.stage(rig.state(stored=False), [draw]), rig.rows(batch))
        zeros = {"Dense_0": jnp.zeros(24), "Dense_1": jnp.zeros(20)}
        visit = on_mesh(rig.mesh, functools.partial(visit_batch, rig.bound), (WHOLE, WHOLE, ROWS), WHOLE)
        found = visit(state.weights, zeros, rig.rows(batch))
        x, params = batch["image"].reshape(16, -1) / np.float32(255), jax.device_get(state.params)
        for name in ("Dense_0", "Dense_1"):
            x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
            np.testing.assert_allclose(found[name], x[batch["valid"]].sum(0), rtol=1e-4)
        links.append(jax.device_get(end_of_task(rig, state, found).strategy_state))
    jax.tree.map(np.testing.assert_array_equal, *links)


# --- its parts ---------------------------------------------------------------------------------------------------------


def test_places_are_drawn_without_replacement_and_alike():
    among = np.arange(60).reshape(6, 10) % 3 > 0
    for count in (0, 7, 40, 55):
        found = np.asarray(some_of(jax.random.key(count), among, count))
        assert found.sum() == min(count, 40) and not (found & ~among).any()
    hits = sum(np.asarray(jax.vmap(lambda key: some_of(key, among, 10))(jax.random.split(jax.random.key(0), 800))))
    assert hits[among].min() > 140 and hits[among].max() < 260  # 200, and 5 sigma


def test_units_without_activity_stay_plastic_and_a_layer_without_room_loses_links():
    assert not np.asarray(most_active(jnp.zeros(5), 0.5)).any()
    np.testing.assert_array_equal(most_active(jnp.array([1.0, 4.0, 0.0, 3.0]), 0.5), [False, True, False, False])
    np.testing.assert_array_equal(most_active(jnp.array([1.0, 4.0, 0.0, 3.0]), 0.51), [False, True, False, True])
    np.testing.assert_array_equal(older(jnp.array([0, 0, 1, 3]), jnp.array([False, True, False, True])), [0, 1, 2, 4])
    links = np.array([[True, True], [True, True], [False, True]])
    full = rewired(jax.random.key(0), links, np.array([True, True, False]), np.array([False, True]))
    np.testing.assert_array_equal(full, [[False, True], [False, True], [False, True]])


def test_the_classes_of_the_last_tasks():
    np.testing.assert_array_equal(recent_classes(CLASSES, 1), CLASSES)
    np.testing.assert_array_equal(
        recent_classes(CLASSES, 2), [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    )
    np.testing.assert_array_equal(recent_classes(CLASSES, 9), np.logical_or.accumulate(CLASSES))


def test_a_layer_is_trained_dense_and_one_behind_the_other():
    shape = (4, 4, 1)
    ten = make_model("mlp", 3, options={"hidden": (5,) * 11})
    assert dense_layers(ten, shape, ()) == (*(f"Dense_{i}" for i in range(11)), "head")
    assert dense_layers(ten, shape, ("Dense_0", "Dense_1"))[0] == "Dense_2"
    assert dense_layers(make_model("mlp", 3, options={"hidden": ()}), shape, ()) == ("head",)
    assert dense_layers(make_model("mlp_norm", 3, options={"hidden": (5,)}), shape, ()) == ()
    assert dense_layers(make_model("convnet", 3, options={"width": 2}), (8, 8, 1), ()) == ()


# --- the memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", [False, True])
def test_a_memory_without_a_class_goes_on_as_the_oracle(counted):
    """Ranked rows of three classes fill it and crowd each other; then one class goes, and others come."""
    devices, capacity = 2, 22
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    more = {"count_classes": True, "repeats": "distinct", "num_ids": 200} if counted else {}
    row = {"x": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}
    buffer = make_buffer(row, capacity=capacity, representatives=4, policy="herding", num_classes=K, mesh=mesh, **more)
    keep = on_mesh(mesh, lambda s, rows: buffer.local.keep(s, rows, jax.random.key(0)), (ROWS, ROWS), ROWS)
    drop = on_mesh(mesh, buffer.local.drop_classes, (ROWS, WHOLE), ROWS)
    oracles, state, begin = [Herding(i, capacity, devices, K) for i in range(devices)], buffer.init(), 0
    for k in (4, 0, 3, "drop", 1, 5, "drop", 2):
        if k == "drop":
            gone = np.isin(np.arange(K), (0, 3) if begin < 100 else (4,))
            state = drop(state, gone)
            oracles = [without(one, gone) for one in oracles]
        else:
            ids = np.arange(begin, begin := begin + 24, dtype=np.int32)
            label, valid = np.full(24, k, np.int32), np.arange(24) % 5 > 0
            rows = Rows({"x": np.stack([ids, ids], 1).astype(jnp.bfloat16)}, label, ids, valid)
            state = keep(state, mesh_lib.shard_rows(mesh, rows))
            for one, part in zip(oracles, np.split(np.arange(24), devices), strict=True):
                one.insert(ids[part], label[part], valid[part])
        held = np.asarray(state.id).reshape(devices, -1)
        for one, mine in zip(oracles, held, strict=True):
            assert [one.slots.get(slot, -1) for slot in range(len(mine))] == list(mine)
        there, labels = held.ravel() >= 0, np.asarray(state.label)
        stored = np.asarray(state.record["x"]).view(jnp.bfloat16).reshape(-1, 2)
        np.testing.assert_array_equal(stored[there, 0].astype(np.int32), held.ravel()[there])
        assert (stored[~there] == 0).all()
        lists = [sum(len(one.lists[c]) for one in oracles) for c in range(K)]
        np.testing.assert_array_equal(np.bincount(labels[there], minlength=K), lists)
        if counted:
            np.testing.assert_array_equal(np.asarray(state.class_rows).sum(0), lists)
            slot_of = np.asarray(state.slot_of).reshape(devices, -1)
            assert all((mine[slot_of[d, mine[mine >= 0]]] == mine[mine >= 0]).all() for d, mine in enumerate(held))


def without(one, gone):
    """The oracle of a shard that gave up some classes: the others' rows move together."""
    kept = sorted(slot for k, rows in enumerate(one.lists) if not gone[k] for slot in rows)
    one.lists = [[kept.index(slot) for slot in rows if slot in kept] for rows in one.lists]
    one.slots = {new: one.slots[old] for new, old in enumerate(kept)}
    return one


def test_a_policy_that_cannot_give_up_a_class_says_so():
    buffer = make_buffer(jax.ShapeDtypeStruct((), np.int32), capacity=4, representatives=2, num_classes=K)
    with pytest.raises(UserError, match=r"^buffer.policy: .* give herding"):
        buffer.local.drop_classes(buffer.init(), jnp.zeros(K, bool))


# --- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run whose weights others begin with."""
    folder = tmp_path_factory.mktemp("first") / "run"
    config = small(strategy="joint", epochs=4, model__options__hidden=(16, 16, 16))
    train_and_evaluate(config, folder, devices=jax.devices()[:1], progress=False)
    return folder


def sharp_run(pretrained, folder, devices=2, **changes):
    more = {"model__init_from": str(pretrained), "latent__layer": "Dense_0", "latent__dtype": "int8", "epochs": 2}
    more |= {"strategy": "sharp", "model__options__hidden": (16, 16, 16), "optimizer__weight_decay": 1e-3}
    more |= {"buffer__capacity": 36}  # as many of each class of the last task on one shard and on two
    config = small(**more | changes)
    return train_and_evaluate(config, folder, devices=jax.devices()[:devices], progress=False)


def test_a_stopped_run_on_activations_ends_as_the_whole(pretrained, tmp_path, monkeypatch):
    found = sharp_run(pretrained, tmp_path / "whole")
    assert found["average_accuracy"] > 0.3 and found["latent"]["frozen"] == ["Dense_0"]
    arrays = last(tmp_path / "whole")[1]
    labels = arrays["buffer.label"][arrays["buffer.id"] >= 0]
    assert set(labels) == set(found["tasks"][-1]) and len(labels) == 36  # the classes of the last task alone
    for name in ("Dense_1", "Dense_2"):
        links, kernel = arrays[f"strategy_state.links.{name}"], arrays[f"params.{name}.kernel"]
        assert links.sum() == round(0.4 * links.size) and (kernel[~links] == 0).all()
        assert arrays[f"strategy_state.age.{name}"].max() == 3
    first = last(pretrained)[1]
    np.testing.assert_array_equal(arrays["params.Dense_0.kernel"], first["params.Dense_0.kernel"])

    stop_at(monkeypatch, [30])
    with pytest.raises(Exception, match="saved at step"):
        sharp_run(pretrained, tmp_path / "stopped")
    monkeypatch.undo()
    sharp_run(pretrained, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    model = load(tmp_path / "whole", devices=jax.devices()[:1])
    assert model.image_shape == (8, 8, 1) and set(model.weights.strategy_state["links"]) == {
        "Dense_1",
        "Dense_2",
        "head",
    }

    sharp_run(pretrained, tmp_path / "one", devices=1)
    other = last(tmp_path / "one")[1]
    assert set(arrays["buffer.id"]) - {-1} == set(other["buffer.id"]) - {-1}


def test_what_does_not_go_together_costs_one_line(tmp_path):
    line = said("training", tmp_path / "run", strategy="sharp", model__name="convnet")
    assert line.startswith("strategy: sharp trains hidden dense layers and a head, which must be all that is trained")
    assert said("training", tmp_path / "run", strategy="sharp", model__options__hidden=()).startswith("strategy: sharp")
    line = said("training", tmp_path / "run", strategy="sharp", optimizer__average=0.9)
    assert (
        line == "optimizer.average: 0.9 is not allowed, give 0: sharp drops links of the last weights at a task's end"
    )
    line = said("training", tmp_path / "run", strategy="sharp", strategies__sharp__density=0.0)
    assert line == "strategies.sharp.density: 0.0 is not allowed, give a number above 0 and at most 1"
    assert said("training", tmp_path / "run", strategy="sharp", buffer__tier="host").startswith("buffer.tier: host")
