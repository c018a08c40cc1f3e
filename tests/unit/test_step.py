"""The training step: its gradients against a plain one-device oracle, on any number of devices, invalid rows or none."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.strategies import make_strategy
from tests.rig import BATCH, DRAWN, RATE, Rig, close, make_batch, make_draw


def one_step(mesh, name, model, *, batch, draw, **options):
    rig = Rig(mesh, make_strategy(name), model, **options)
    state = rig.stage(rig.state(stored=False), [draw] * rig.strategy.draws)
    return rig.step(state, rig.rows(batch))


def learnt(state):
    return jax.device_get((state.params, state.batch_stats))


@pytest.mark.parametrize("model", ["mlp", pytest.param("convnet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["incremental", "er"])
@pytest.mark.parametrize("devices", [2, 8])
def test_any_number_of_devices_takes_the_same_step(name, model, devices, mesh_of):
    rows = {"batch": make_batch(0), "draw": make_draw(1)}
    one, expected = one_step(mesh_of(1), name, model, **rows)
    many, found = one_step(mesh_of(devices), name, model, **rows)
    close(learnt(many), learnt(one))
    close(jax.device_get(found), jax.device_get(expected))


def test_a_row_is_augmented_alike_on_any_number_of_devices(mesh_of):
    """New and replayed rows are numbered in the global batch: every crop and mirror is that of one device."""
    rows = {"batch": make_batch(0), "draw": make_draw(1), "augment": ("crop", "flip")}
    one, many = (one_step(mesh_of(n), "er", "mlp", **rows)[0] for n in (1, 4))
    close(learnt(many), learnt(one))
    plain, _ = one_step(mesh_of(1), "er", "mlp", **rows | {"augment": ()})
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (learnt(plain), learnt(one))), strict=True))


def test_local_statistics_are_those_of_each_device_and_their_mean_is_kept(mesh_of):
    """norm = local on four devices, one of them without a valid row, against one device after the other."""
    devices, batch, draw = 4, make_batch(0), make_draw(1)
    rig = Rig(mesh_of(devices), make_strategy("er"), "convnet", network={"norm": "local"})
    state = rig.stage(rig.state(stored=False), [draw])
    before = jax.device_get((state.params, state.batch_stats))
    after, _ = rig.step(state, rig.rows(batch))

    def by_device(new, drawn):
        return np.concatenate([x.reshape(devices, -1, *x.shape[1:]) for x in (new, drawn)], axis=1)

    image, label, valid = (
        by_device(batch["image"], draw.record["image"]) / np.float32(255),
        by_device(batch["label"], draw.label),
        by_device(batch["valid"], draw.valid),
    )

    def loss(params):
        def one_device(image, valid):
            return rig.model.apply(params, before[1], image, train=True, mask=valid)

        outputs, stats = jax.vmap(one_device)(image, valid)
        picked = jnp.take_along_axis(jax.nn.log_softmax(outputs["logits"]), label[..., None], axis=2)[..., 0]
        return -jnp.sum(jnp.where(valid, picked, 0.0)) / valid.sum(), stats

    grads, stats = jax.jit(jax.grad(loss, has_aux=True))(before[0])
    close(jax.device_get(after.params), jax.tree.map(lambda w, g: w - RATE * g, before[0], grads), atol=1e-5)
    close(jax.device_get(after.batch_stats), jax.tree.map(lambda x: np.mean(x, axis=0), stats), atol=1e-5)
    assert all((np.std(x, axis=0) > 0).any() for x in jax.tree.leaves(stats))  # there is something to average
    for leaf in jax.tree.leaves(after.batch_stats):  # and every device has the mean
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, leaf)


@pytest.mark.parametrize("name", ["incremental", "er"])
def test_the_loss_is_the_mean_over_all_valid_rows(name, mesh_of):
    """Against cross-entropy written out over the valid rows alone, and its gradient by JAX on one device."""
    batch, draw = make_batch(0), make_draw(1)
    rig = Rig(mesh_of(4), make_strategy(name))
    state = rig.stage(rig.state(stored=False), [draw] * rig.strategy.draws)
    before = jax.device_get(state.params)
    after, metrics = rig.step(state, rig.rows(batch))

    parts = [(batch["image"], batch["label"], batch["valid"])]
    if name == "er":
        parts.append((draw.record["image"], draw.label, draw.valid))
    image, label = (np.concatenate([part[i][part[2]] for part in parts]) for i in (0, 1))

    def loss(params):
        outputs, _ = rig.model.apply(params, {}, image / np.float32(255), train=True)
        logits = outputs["logits"]
        picked = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0]
        return jnp.mean(jnp.log(jnp.sum(jnp.exp(logits), axis=1)) - picked)

    value, grads = jax.value_and_grad(loss)(before)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    close(jax.device_get(after.params), jax.tree.map(lambda p, g: p - RATE * g, before, grads))
    assert float(metrics["rows"]) == batch["valid"].sum()
    assert float(metrics["replayed"]) == (draw.valid.sum() if name == "er" else 0)


@pytest.mark.parametrize("model", ["mlp", pytest.param("convnet", marks=pytest.mark.slow)])
def test_rows_that_are_not_valid_weigh_nothing(model, mesh_of):
    batch, draw = make_batch(0), make_draw(1)
    junk = {name: np.array(x) for name, x in batch.items()}
    junk["image"][~batch["valid"]], junk["label"][~batch["valid"]] = 255, 10**6
    image = np.where(draw.valid[:, None, None, None], draw.record["image"], 7)
    other = dataclasses.replace(draw, record={"image": image}, label=np.where(draw.valid, draw.label, -3))
    clean = one_step(mesh_of(4), "er", model, batch=batch, draw=draw)
    dirty = one_step(mesh_of(4), "er", model, batch=junk, draw=other)
    jax.tree.map(np.testing.assert_array_equal, learnt(dirty[0]), learnt(clean[0]))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(dirty[1]), jax.device_get(clean[1]))


def test_a_batch_without_a_valid_row_changes_no_weight(mesh_of):
    empty = make_batch(0) | {"valid": np.zeros(BATCH, bool)}
    nothing = dataclasses.replace(make_draw(1), valid=np.zeros(DRAWN, bool))
    rig = Rig(mesh_of(4), make_strategy("er"), "convnet")
    before = learnt(rig.state(stored=False))
    after, metrics = one_step(mesh_of(4), "er", "convnet", batch=empty, draw=nothing)
    jax.tree.map(np.testing.assert_array_equal, learnt(after), before)
    assert {name: float(metrics[name]) for name in ("loss", "rows", "replayed")} == {
        "loss": 0,
        "rows": 0,
        "replayed": 0,
    }


def test_a_step_replays_what_the_last_one_drew(mesh_of):
    rig = Rig(mesh_of(4), make_strategy("er"))
    first, metrics = rig.step(rig.state(), rig.rows(make_batch(0)))
    assert float(metrics["replayed"]) == 0  # nothing had been drawn yet
    stored = np.flatnonzero(make_batch(0)["valid"])
    (staged,) = first.staged
    ids = np.asarray(staged.id)[np.asarray(staged.valid)]
    assert len(ids) == min(len(stored), DRAWN) and set(ids) <= set(stored)  # drawn after the insert of the same step

    def copy():
        return jax.tree.map(jnp.copy, first)

    whole, metrics = rig.step(copy(), rig.rows(make_batch(1)))
    assert float(metrics["replayed"]) == len(ids)
    without = dataclasses.replace(copy(), buffer=rig.buffer.init())  # the buffer itself is not what is replayed
    jax.tree.map(np.testing.assert_array_equal, learnt(rig.step(without, rig.rows(make_batch(1)))[0]), learnt(whole))
    unstaged = dataclasses.replace(copy(), staged=(rig.buffer.no_rows(),))
    changed = rig.step(unstaged, rig.rows(make_batch(1)))[0]
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (learnt(changed), learnt(whole))), strict=True))


@pytest.mark.parametrize("name", ["incremental", "er"])
def test_one_trace_serves_all_steps_and_tasks(name, mesh_of):
    rig = Rig(mesh_of(2), make_strategy(name))
    state = rig.state()
    for t in range(3):
        number = jax.device_put(np.int32(t), state.task.sharding)
        state, _ = rig.step(dataclasses.replace(state, task=number), rig.rows(make_batch(t)))
    assert rig.step._cache_size() == 1
    assert int(state.step) == 3


def test_a_prepared_step_is_the_program_compiled(mesh_of):
    rig, batch = Rig(mesh_of(2), make_strategy("er")), make_batch(0)
    step = rig.train_step.prepare(rig.state(), rig.rows(batch), contextlib.nullcontext)
    found, expected = (run(rig.state(), rig.rows(batch)) for run in (step, rig.step))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))
    with pytest.raises(TypeError, match="compiled"):  # rather than compile again without a word
        step(rig.state(), rig.rows(make_batch(0, n=2 * BATCH)))


def test_the_buffer_is_updated_in_place(mesh_of):
    """No temporary grows with the capacity, and the output state takes the input's memory."""

    def memory(capacity):
        rig = Rig(mesh_of(2), make_strategy("er"), capacity=capacity)
        analysis = rig.train_step.lower(rig.state(), rig.rows(make_batch(0)))[0].compile().memory_analysis()
        return analysis.temp_size_in_bytes, analysis.alias_size_in_bytes, rig.buffer.num_bytes

    (temp, _, _), (more_temp, aliased, num_bytes) = memory(1_000), memory(100_000)
    assert more_temp <= temp + 1_000
    assert aliased >= num_bytes / 2  # what each of the two devices holds


def test_loss_classes_restrict_the_classification(mesh_of):
    """Task 1 of three, classes 2 and 3: of the logits of the others, `seen` ignores 4 and 5, `task` 0 and 1 too."""
    batch, draw = make_batch(0, (2, 3)), make_draw(1, classes=(0, 1))
    gradients = {}
    for loss_classes in ("all", "seen", "task"):
        rig = Rig(mesh_of(2), make_strategy("er"), loss_classes=loss_classes)
        state = rig.stage(rig.state(stored=False, task=np.int32(1)), [draw])
        before = np.asarray(state.params["head"]["bias"])
        gradients[loss_classes] = (
            before - np.asarray(rig.step(state, rig.rows(batch))[0].params["head"]["bias"])
        ) / RATE
    assert (gradients["all"] != 0).all()
    assert (gradients["seen"][:4] != 0).all() and (gradients["seen"][4:] == 0).all()
    # One head a task: the replayed rows of classes 0, 1 and the new ones of 2, 3 do not push each other's logits.
    for head in ([0, 1], [2, 3]):
        assert gradients["task"][head].sum() == pytest.approx(0, abs=1e-6) and (gradients["task"][head] != 0).all()
    assert (gradients["task"][4:] == 0).all()
