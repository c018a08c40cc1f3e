"""DyTox: the model against the paper's sizes and a plain form of its formulas; how it grows; the strategy around it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.errors import UserError
from jaxcl.models import make_model
from jaxcl.models.dytox import relative_positions
from jaxcl.strategies import make_strategy
from jaxcl.strategies.base import Context, Part
from jaxcl.strategies.dytox import apart, features, mirrored, mixed
from jaxcl.training.loop import train_and_evaluate
from tests.rig import CLASSES, K, Rig, close, make_batch
from tests.whole import small

TINY = {"width": 8, "depth": 2, "heads": 4, "patch": 4}


def tasks_of(classes, tasks):
    return np.arange(classes)[None] // (classes // tasks) == np.arange(tasks)[:, None]


@pytest.mark.parametrize("tasks,millions", [(1, 10.72), (10, 10.73), (20, 10.74), (50, 10.77)])
def test_it_has_the_paper_s_parameters(tasks, millions):
    """Table 2 of the paper for CIFAR-100, cut off after two decimals; without divergence heads, which are thrown away."""
    model = make_model("dytox", 100, options={"divergence": False}, classes=tasks_of(100, tasks))
    variables = jax.eval_shape(lambda key: model.init(key, (32, 32, 3)), jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert int(count / 1e4) / 100 == millions
    # 5 blocks and the task attention, their four norms and projections of 384; patches, positions; a token, a norm a task
    block = 2 * 768 + 3 * 384**2 + 384**2 + 384 + (3 * 12 + 12) + 12 + 8 * 384**2 + 5 * 384
    decoder = 2 * 768 + 3 * 384**2 + 384**2 + 384 + 8 * 384**2 + 5 * 384
    assert count == 5 * block + decoder + (4 * 4 * 3 + 1 + 64) * 384 + tasks * 3 * 384 + 100 * 385


def test_shapes_are_the_paper_s():
    model = make_model("dytox", 100, classes=tasks_of(100, 10))
    shapes = jax.eval_shape(
        lambda key, x: model.apply(**model.init(key, x.shape[1:]), images=x, train=True)[0],
        jax.random.key(0), jax.ShapeDtypeStruct((3, 32, 32, 3), np.float32),
    )  # fmt: skip
    assert {name: x.shape for name, x in shapes.items()} == {
        "logits": (3, 100), "features": (3, 3840), "embeddings": (3, 10, 384), "divergence": (3, 10, 11),
    }  # fmt: skip
    some = make_model("dytox", 8, options=TINY, classes=np.eye(2, 8, dtype=bool))  # 6 of 8 classes do not come
    params = jax.eval_shape(lambda key: some.init(key, (8, 8, 1)), jax.random.key(0))["params"]
    assert params["tokens"].shape == (2, 8) and params["divergence"]["kernel"].shape == (8, 2 * 2)
    with pytest.raises(UserError, match=r"model\.options\.patch: 3 is not allowed, .*32x32"):
        make_model("dytox", 10, options={"patch": 3}).init(jax.random.key(0), (32, 32, 3))
    with pytest.raises(UserError, match=r"model\.options\.heads: 5 is not allowed, .*width = 384"):
        make_model("dytox", 10, options={"heads": 5}).init(jax.random.key(0), (32, 32, 3))


# --- the formulas, image by image, head by head, task by task ---------------------------------------------------------


def norm(x, scale, shift):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + shift


def softmax(x):
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def perceptron(p, x):
    wide = x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    return np.asarray(jax.nn.gelu(wide, approximate=False)) @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def layer_norm(p, x):
    return norm(x, p["scale"], p["bias"])


def gated(p, x, side, heads):
    """ConViT, equations 6 and 7."""
    each, out = x.shape[1] // heads, []
    query, key = np.split(x @ p["qk"]["kernel"], 2, axis=1)
    value = x @ p["v"]["kernel"]
    for h in range(heads):
        of = slice(h * each, (h + 1) * each)
        place = np.array([
            [
                np.dot([qx - px, qy - py, (qx - px) ** 2 + (qy - py) ** 2], p["pos_proj"]["kernel"][:, h])
                for qy in range(side) for qx in range(side)
            ]
            for py in range(side) for px in range(side)
        ]) + p["pos_proj"]["bias"][h]  # fmt: skip
        gate = 1 / (1 + np.exp(-p["gate"][h]))
        attention = (1 - gate) * softmax(query[:, of] @ key[:, of].T / np.sqrt(each)) + gate * softmax(place)
        out.append(attention @ value[:, of])
    return np.concatenate(out, axis=1) @ p["proj"]["kernel"] + p["proj"]["bias"]


def decode(p, token, x, heads):
    """The task-attention block for one token, as if it were alone: equations 3 to 5 of DyTox."""
    both = layer_norm(p["LayerNorm_0"], np.concatenate([token[None], x]))
    each, out = x.shape[1] // heads, []
    query, key, value = both[0] @ p["q"]["kernel"], both @ p["k"]["kernel"], both @ p["v"]["kernel"]
    for h in range(heads):
        of = slice(h * each, (h + 1) * each)
        out.append(softmax(key[:, of] @ query[of] / np.sqrt(each)) @ value[:, of])
    token = token + np.concatenate(out) @ p["proj"]["kernel"] + p["proj"]["bias"]
    return token + perceptron(p["Perceptron_0"], layer_norm(p["LayerNorm_1"], token))


def test_it_follows_the_formulas():
    """All weights drawn anew, so that no part is silent; images of 3 x 3 patches, two classes in each of three tasks."""
    model = make_model("dytox", K, options=TINY, classes=CLASSES)
    params = model.init(jax.random.key(0), (12, 12, 1))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32) * 0.4, params)
    images = rng.random((2, 12, 12, 1)).astype(np.float32)
    found = model.apply(params, {}, images, train=True)[0]
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    for image, logits, embeddings, divergence in zip(
        images, *(found[name] for name in ("logits", "embeddings", "divergence")), strict=True
    ):
        patches = image.reshape(3, 4, 3, 4).transpose(0, 2, 1, 3).reshape(9, 16)
        x = patches @ p["patch_embed"]["kernel"].reshape(16, 8) + p["patch_embed"]["bias"] + p["pos_embed"]
        for number in range(2):
            block = p[f"block_{number}"]
            x = x + gated(block["attention"], layer_norm(block["LayerNorm_0"], x), 3, 4)
            x = x + perceptron(block["Perceptron_0"], layer_norm(block["LayerNorm_1"], x))
        for task in range(3):
            e = decode(p["task_attention"], p["tokens"][task], x, 4)
            np.testing.assert_allclose(embeddings[task], e, rtol=1e-4, atol=1e-4)
            for name, columns, told in (
                ("heads", slice(2 * task, 2 * task + 2), logits[2 * task : 2 * task + 2]),
                ("divergence", slice(3 * task, 3 * task + 3), divergence[task]),
            ):
                normed = norm(e, p[name]["scale"][task], p[name]["shift"][task])
                expected = normed @ p[name]["kernel"][:, columns] + p[name]["bias"][columns]
                np.testing.assert_allclose(told, expected, rtol=1e-4, atol=1e-4)


def test_a_head_begins_as_one_place_of_a_convolution():
    """9 of 12 heads look from an inner patch of 5 x 5 first at one of its 3 x 3 neighbours each, and straight at no other."""
    params = make_model("dytox", K, options={"width": 24}).init(jax.random.key(0), (20, 20, 1))["params"]
    attention = params["block_0"]["attention"]
    scores = relative_positions((5, 5)) @ np.asarray(attention["pos_proj"]["kernel"])
    middle = scores[12, :, :9].argmax(axis=0)
    assert sorted(middle) == [6, 7, 8, 11, 12, 13, 16, 17, 18] and (np.asarray(attention["gate"]) == 1).all()
    np.testing.assert_array_equal(attention["v"]["kernel"], np.eye(24))


# --- growth -----------------------------------------------------------------------------------------------------------


def moved(before, after):
    """Which weights differ, by name."""
    differ = jax.tree.map(lambda a, b: np.asarray(a != b), before, after)
    return {
        "tokens": differ["tokens"].any(1).tolist(),
        "norms": differ["heads"]["scale"].any(1).tolist(),
        "classes": differ["heads"]["kernel"].any(0).tolist(),
        "divergence": differ["divergence"]["kernel"].any(0).reshape(3, 3).any(1).tolist(),
        "patch_embed": bool(differ["patch_embed"]["kernel"].any()),
        "block_0": bool(differ["block_0"]["attention"]["qk"]["kernel"].any()),
    }


def test_the_past_is_held_the_future_waits_and_nothing_is_compiled_anew(mesh_of):
    """Three tasks by one compiled step, with an optimiser that has momentum and decay; then the fine-tuning."""
    optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    make = functools.partial(Rig, mesh_of(2), make_strategy("dytox")._replace(draws=0), "dytox", optimizer=optimizer)
    rig = make()
    state = rig.state()
    for task in range(3):
        state = dataclasses.replace(state, task=rig.state(task=np.int32(task)).task)
        before = jax.device_get(state.params)
        for seed in range(2):
            state, _ = rig.step(state, rig.rows(make_batch(seed, tuple(range(2 * task + 2)))))
        now = (np.arange(3) == task).tolist()
        assert moved(before, jax.device_get(state.params)) == {
            "tokens": now, "norms": now, "classes": np.repeat(now, 2).tolist(),
            "divergence": now if task else [False] * 3, "patch_embed": True, "block_0": True,
        }  # fmt: skip
    assert rig.step._cache_size() == 1
    tuned = make(tuning=True, frozen=("patch_embed", "pos_embed", "block_0"))
    state = dataclasses.replace(state, task=rig.state(task=np.int32(1)).task)
    before = jax.device_get(state.params)
    state, _ = tuned.step(state, tuned.rows(make_batch(5, (0, 1, 2, 3))))
    begun = [True, True, False]
    assert moved(before, jax.device_get(state.params)) == {
        "tokens": begun, "norms": begun, "classes": np.repeat(begun, 2).tolist(), "divergence": [False] * 3,
        "patch_embed": False, "block_0": False,
    }  # fmt: skip


# --- the strategy -----------------------------------------------------------------------------------------------------


def context_of(task):
    return Context(lambda *x: {}, {}, jnp.int32(task), CLASSES, jnp.float32(0))


def test_the_divergence_head_tells_the_task_s_classes_apart():
    logits = np.random.default_rng(0).normal(size=(4, 3, 3)).astype(np.float32)
    wanted = jnp.eye(K)[jnp.array([0, 3, 2, 1])]
    found = apart(jnp.asarray(logits), wanted, context_of(1))
    q, target = 1 / (1 + np.exp(-logits[:, 1])), np.eye(3)[[0, 2, 1, 0]]  # classes 0 and 1 are the old as one
    np.testing.assert_allclose(found, -np.where(target, np.log(q), np.log(1 - q)).mean(1), rtol=1e-5)
    assert (np.asarray(apart(jnp.asarray(logits), wanted, context_of(0))) == 0).all()


def test_features_are_the_embeddings_of_the_tasks_so_far():
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    found = np.asarray(features({"embeddings": x, "features": x.reshape(2, 12)}, context_of(1)))
    np.testing.assert_array_equal(found[:, :8], x[:, :2].reshape(2, 8))
    assert (found[:, 8:] == 0).all()


@pytest.mark.parametrize("devices", [1, 4])
def test_rows_are_mixed_with_those_at_the_mirror_place(devices, mesh_of):
    batch = make_batch(0, (0, 1, 2, 3))
    seen = np.arange(K) < 4
    image = np.where(batch["valid"][:, None, None, None], batch["image"].astype(np.float32), np.nan)

    def mix(image, label, valid):
        part = Part(image, label, valid, label)
        fewer = Part(image[:1], label[:1], valid[:1], label[:1])  # travels with it, and is mirrored by itself
        part = mixed(part, mirrored([fewer, part])[1], jnp.float32(0.3), 0.2, jnp.asarray(seen))
        return part.image, part.record["mixed"]

    split = jax.sharding.PartitionSpec("data")
    mix = jax.shard_map(mix, mesh=mesh_of(devices), in_specs=split, out_specs=split, check_vma=False)
    mixed_image, wanted = jax.jit(mix)(image, batch["label"], batch["valid"])
    smooth = 0.8 * np.eye(K)[batch["label"]] + 0.2 * seen / 4
    for i in np.flatnonzero(batch["valid"]):
        share = 0.3 if batch["valid"][-1 - i] else 1.0
        other = np.nan_to_num(image[-1 - i])
        np.testing.assert_allclose(mixed_image[i], share * image[i] + (1 - share) * other, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(wanted[i], share * smooth[i] + (1 - share) * smooth[-1 - i], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_dytox_plus_takes_the_same_step_on_any_number_of_devices(mesh_of):
    def step(devices):
        strategy = make_strategy("dytox", {"mixup": 0.8})._replace(draws=0)
        rig = Rig(mesh_of(devices), strategy, "dytox")
        state, metrics = rig.step(rig.state(task=np.int32(1)), rig.rows(make_batch(0, (0, 1, 2, 3))))
        return jax.device_get((state.params, metrics))

    close(step(4), step(1), atol=2e-5)


@pytest.mark.slow
def test_a_whole_run(tmp_path, mesh_of):
    """Digits, three tasks of two classes, appended memory, fine-tuning of all but the encoder: classes that have not come are
    never named, those of the first task are learned, and later ones are named too."""
    config = small(
        strategy="dytox", batch_size=16, epochs=3, buffer__capacity=24, buffer__replay="append", finetune__epochs=2,
        finetune__frozen=("patch_embed", "pos_embed", "block_0"), finetune__order="sequential", finetune__ranks=1,
        optimizer__name="adamw", optimizer__learning_rate=0.01,
    )  # fmt: skip
    with config.ignore_type():
        config.data.tasks = ((0, 1), (2, 3), (4, 5))
    config.model.name, config.model.options = "dytox", {"width": 8, "depth": 1, "heads": 4, "patch": 4}
    result = train_and_evaluate(config, tmp_path, devices=jax.devices()[:2], progress=False)
    assert result["replay"]["draws_per_epoch"] == [0, 24, 24] and result["buffer"]["class_histogram"][:6] == [4] * 6
    matrix = np.array(result["accuracy_matrix"])
    assert (np.triu(matrix, 1) == 0).all() and matrix[0, 0] > 0.6 and np.diag(matrix).min() > 0.2
