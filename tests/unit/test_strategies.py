"""Every strategy: its update against the formula of its paper written out on one device, and N devices against one."""

import ast
import dataclasses
import functools
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import optimize

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows
from jaxcl.data import make_normalize
from jaxcl.errors import UserError
from jaxcl.strategies import STRATEGIES, Strategy, default_options, make_strategy
from jaxcl.strategies.agem import project
from jaxcl.strategies.bic import is_held_out
from jaxcl.strategies.wa import align
from jaxcl.training.end_task import make_end_task
from tests.rig import CLASSES, DRAWN, RATE, SHAPE, K, Rig, close, make_batch, make_draw

OLD, SEEN = np.arange(K) < 2, np.arange(K) < 4  # in task 1 of three
SCALE = np.float32([1.0, 0.8, 1.0, 1.0, 1.0, 1.0])  # bic's correction, as if an earlier task had brought class 1 alone
SHIFT = np.float32([0.0, -0.4, 0.0, 0.0, 0.0, 0.0])
STEPPED = sorted(set(STRATEGIES) - {"from_scratch", "joint"})  # these two differ in their rows alone


OPTIONS = {
    "der": {"alpha": 0.7},
    "der_pp": {"alpha": 0.7, "beta": 0.4},
    "l2": {"strength": 0.7},
    "ewc": {"strength": 0.7},
    "lwf": {"alpha": 0.7, "temperature": 3.0},
    "feature_distillation": {"strength": 0.7},
    "mir": {"replayed": 3},
    "bic": {"temperature": 3.0, "held_out": 0.3},
    "dytox": {"temperature": 3.0},
}


@functools.cache
def rig_of(mesh, name: str):
    """A rig, compiled once for all tests that use it."""
    return Rig(mesh, make_strategy(name, OPTIONS.get(name)))


def old_model(rig: Rig):
    """Weights unlike the present ones, as the strategy's state of an earlier task."""
    params, batch_stats, _ = rig.new_weights(jax.random.key(99))
    return params, batch_stats


def own_state(name: str, rig: Rig):
    """A state of the strategy such as an earlier task leaves."""
    params, batch_stats = old_model(rig)
    if name == "l2":
        return params
    if name == "ewc":
        fisher = jax.tree.map(lambda w: jnp.abs(w) + 0.01, params)
        return {"fisher": fisher, "pulled": jax.tree.map(jnp.multiply, fisher, params)}
    if name in ("lwf", "feature_distillation"):
        return params, batch_stats
    if name == "icarl":
        return {**rig.strategy.init(params, batch_stats), "model": (params, batch_stats)}
    if name == "dytox":
        return {**rig.strategy.init(params, batch_stats), "model": (params, batch_stats)}
    if name == "bic":
        return {"model": (params, batch_stats), "scale": SCALE, "shift": SHIFT}
    return {}


def prepared(mesh, name: str):
    """A rig, and its state in task 1 with rows to replay; without a buffer to insert into, which these tests don't need."""
    rig = rig_of(mesh, name)
    draws = [make_draw(10 + i, logits=True, classes=(0, 1, 2, 3)) for i in range(rig.strategy.draws)]
    state = rig.state(stored=False, task=np.int32(1), strategy_state=own_state(name, rig))
    return rig, rig.stage(state, draws), draws


@pytest.mark.parametrize("name", STEPPED)
def test_any_number_of_devices_takes_the_same_step(name, mesh_of):
    def step(devices):
        rig, state, _ = prepared(mesh_of(devices), name)
        state, metrics = rig.step(state, rig.rows(make_batch(0, (2, 3))))
        return jax.device_get((state.params, state.batch_stats, metrics))

    close(step(4), step(1), atol=1e-5)


# --- the formulas, over the valid rows alone, on one device ---------------------------------------------------------


def entropy(logits, label, classes=None):
    """CE among `classes`, by the definition."""
    exp = jnp.exp(logits) * (1.0 if classes is None else classes)
    return -jnp.log(exp[jnp.arange(len(label)), label] / exp.sum(1))


def er_ace(new, replay, ask, params, old):
    arrived = np.isin(np.arange(K), np.unique(new.label))
    return (
        entropy(ask(params, new), new.label, arrived).mean() + entropy(ask(params, replay), replay.label, SEEN).mean()
    )


def der(new, replay, ask, params, old):
    return (
        entropy(ask(params, new), new.label).mean()
        + 0.7 * ((ask(params, replay) - replay.record["logits"]) ** 2).mean()
    )


def der_pp(new, first, second, ask, params, old):
    value = (
        entropy(ask(params, new), new.label).mean() + 0.7 * ((ask(params, first) - first.record["logits"]) ** 2).mean()
    )
    return value + 0.4 * entropy(ask(params, second), second.label).mean()


def l2(new, ask, params, old):
    squares = jax.tree.map(lambda w, o: ((w - o) ** 2).sum(), params, old)
    return entropy(ask(params, new), new.label).mean() + 0.7 * sum(jax.tree.leaves(squares))


def ewc(new, ask, params, old):
    terms = jax.tree.map(lambda w, o: ((jnp.abs(o) + 0.01) * (w - o) ** 2).sum(), params, old)
    return entropy(ask(params, new), new.label).mean() + 0.7 * sum(jax.tree.leaves(terms))


def lwf(new, ask, params, old):
    p, q = (jax.nn.softmax(ask(weights, new)[:, :2] / 3.0) for weights in (old, params))
    return entropy(ask(params, new), new.label).mean() + 0.7 * 9.0 * (p * jnp.log(p / q)).sum(1).mean()


def feature_distillation(new, ask, params, old):
    distance = ((ask(params, new, "features") - ask(old, new, "features")) ** 2).sum(1)
    return entropy(ask(params, new), new.label).mean() + 0.7 * distance.mean()


def icarl(new, replay, ask, params, old):
    losses = []
    for part in (new, replay):
        q = 1 / (1 + jnp.exp(-ask(params, part)))
        target = jnp.where(OLD, 1 / (1 + jnp.exp(-ask(old, part))), part.label[:, None] == np.arange(K))
        losses.append(-jnp.where(SEEN, target * jnp.log(q) + (1 - target) * jnp.log(1 - q), 0).sum(1))
    return jnp.concatenate(losses).mean()


def bic(new, replay, ask, params, old):
    losses = []
    for part in (new, replay):
        learned = ~np.asarray(is_held_out(part.id, 0.3))
        logits, teacher = (SCALE * ask(weights, part)[learned] + SHIFT for weights in (params, old))
        p = jax.nn.softmax(teacher[:, :2] / 3.0)
        kept = (p * jnp.log(p / jax.nn.softmax(logits[:, :2] / 3.0))).sum(1)
        losses.append(0.5 * entropy(logits, part.label[learned]) + 0.5 * kept)  # 2 old classes of 4
    return jnp.concatenate(losses).mean()


def dytox(new, replay, ask, params, old):
    losses = []  # of a model without divergence heads
    for part in (new, replay):
        q, target = 1 / (1 + jnp.exp(-ask(params, part)[:, :4])), part.label[:, None] == np.arange(4)
        binary = -(target * jnp.log(q) + (1 - target) * jnp.log(1 - q)).mean(1)
        p, q = (jax.nn.softmax(ask(weights, part)[:, :2] / 3.0) for weights in (old, params))
        losses.append(0.5 * binary + 0.5 * 9.0 * (p * jnp.log(p / q)).mean(1))  # 2 old classes of 4
    return jnp.concatenate(losses).mean()


FORMULAS = (er_ace, der, der_pp, l2, ewc, lwf, feature_distillation, icarl, bic, dytox)


def only_valid(rows):
    """The valid rows, as something with the attributes of a Drawn."""
    if isinstance(rows, dict):
        rows = dataclasses.replace(
            make_draw(0), record={"image": rows["image"]}, label=rows["label"], id=rows["id"], valid=rows["valid"]
        )
    parts = {"record": rows.record, "label": rows.label, "id": rows.id}
    return dataclasses.replace(rows, **jax.tree.map(lambda x: x[rows.valid], parts))


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f.__name__)
def test_a_step_follows_the_formula(formula, mesh_of):
    rig, state, draws = prepared(mesh_of(4), formula.__name__)
    batch = make_batch(0, (2, 3))
    old, _ = old_model(rig)

    def ask(params, part, output="logits"):
        return rig.model.apply(params, {}, part.record["image"] / np.float32(255), train=True)[0][output]

    parts = [only_valid(rows) for rows in (batch, *draws)]
    before = jax.device_get(state.params)
    value, grads = jax.value_and_grad(lambda params: formula(*parts, ask, params, old))(before)
    after, metrics = rig.step(state, rig.rows(batch))
    close(after.params, jax.tree.map(lambda w, g: w - RATE * g, before, grads), atol=1e-5)
    if formula is not ewc:  # whose loss lacks a constant
        assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-4)


@pytest.mark.parametrize("name", ["l2", "feature_distillation", "lwf", "ewc"])
def test_without_an_earlier_task_nothing_is_held(name, mesh_of):
    rig = Rig(mesh_of(2), make_strategy(name))
    plain = Rig(mesh_of(2), make_strategy("incremental"))
    steps = [r.step(r.step(r.state(), r.rows(make_batch(0)))[0], r.rows(make_batch(1)))[0].params for r in (rig, plain)]
    close(*steps)


# --- methods that choose or change gradients -------------------------------------------------------------------------


def test_agem_projects_only_what_conflicts():
    g, h = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}, {"w": jnp.array([0.0, 1.0]), "b": jnp.array(0.0)}
    close(project(g, h), {"w": jnp.array([1.0, 0.0]), "b": jnp.array(0.5)})  # the component against h is gone
    agreeing = jax.tree.map(jnp.negative, h)
    for reference in (agreeing, jax.tree.map(jnp.zeros_like, h)):
        jax.tree.map(np.testing.assert_array_equal, project(g, reference), g)


def test_agem_does_not_raise_the_loss_on_memory(mesh_of):
    """New rows of one class, memory of another: gradients conflict, and to first order the replayed loss must not grow."""
    rig, state, _ = prepared(mesh_of(4), "agem")
    batch, draw = make_batch(0, (2,)), make_draw(1, classes=(3,))
    state = rig.stage(state, [draw])
    before = jax.device_get(state.params)
    step = jax.tree.map(lambda w, v: (w - v) / RATE, before, jax.device_get(rig.step(state, rig.rows(batch))[0].params))

    def gradient(rows):
        def loss(params):
            logits = rig.model.apply(params, {}, rows.record["image"] / np.float32(255), train=True)[0]["logits"]
            return entropy(logits, rows.label).mean()

        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.grad(loss)(before))])

    new, memory = gradient(only_valid(batch)), gradient(only_valid(draw))
    taken = np.concatenate([np.ravel(x) for x in jax.tree.leaves(step)])
    assert new @ memory < -1e-3  # without the projection the loss on memory would grow
    assert taken @ memory == pytest.approx(0, abs=1e-4)


def test_mir_replays_the_rows_that_the_update_would_harm_most(mesh_of):
    rig, state, (draw,) = prepared(mesh_of(4), "mir")
    batch = make_batch(0, (2, 3))
    before = jax.device_get(state.params)

    def losses(params, rows):
        logits = rig.model.apply(params, {}, rows.record["image"] / np.float32(255), train=True)[0]["logits"]
        return entropy(logits, rows.label)

    grads = jax.grad(lambda params: losses(params, only_valid(batch)).mean())(before)
    ahead = jax.tree.map(lambda w, g: w - RATE * g, before, grads)
    harm = np.where(draw.valid, losses(ahead, draw) - losses(before, draw), -np.inf)
    chosen = dataclasses.replace(draw, valid=np.isin(np.arange(DRAWN), np.argsort(-harm)[:3]))

    found, metrics = rig.step(state, rig.rows(batch))
    er, waiting, _ = prepared(mesh_of(4), "er")
    expected, _ = er.step(er.stage(waiting, [chosen]), er.rows(batch))
    assert float(metrics["replayed"]) == 3
    close(found.params, expected.params)


def test_gdumb_learns_nothing_from_the_stream_and_fills_its_memory(mesh_of):
    rig = Rig(mesh_of(2), make_strategy("gdumb"), learn=False)
    before = jax.device_get(rig.state().params)
    batch = make_batch(0)
    state, _ = rig.step(rig.state(), rig.rows(batch))
    jax.tree.map(np.testing.assert_array_equal, state.params, before)
    assert rig.buffer.stats(state.buffer)["rows"] == batch["valid"].sum()


@pytest.mark.parametrize("name", ["der", "der_pp"])
def test_the_logits_stored_are_those_of_the_step_that_saw_the_row(name, mesh_of):
    rig = Rig(mesh_of(2), make_strategy(name))
    batch = make_batch(0)
    state = rig.state()
    before = jax.device_get(state.params)
    state, _ = rig.step(state, rig.rows(batch))
    image = batch["image"] / np.float32(255)
    expected = np.asarray(rig.model.apply(before, {}, image, train=True)[0]["logits"])
    ids = np.asarray(state.buffer.id)
    stored = np.asarray(state.buffer.record["logits"])[ids >= 0]
    np.testing.assert_allclose(stored, expected[ids[ids >= 0]], rtol=1e-5, atol=1e-6)
    assert len(stored) == batch["valid"].sum()
    if name == "der_pp":  # two independent draws: equal ones would have probability 1 / 8!
        assert (np.asarray(state.staged[0].id) != np.asarray(state.staged[1].id)).any()


# --- the end of a task ------------------------------------------------------------------------------------------------


def end_of_task(rig: Rig, state, batches=()):
    return make_end_task(rig.mesh, rig.model, rig.strategy, make_normalize(SHAPE), CLASSES)(state, lambda: batches)


def remember(rig: Rig, state, batch):
    """The state with the batch's valid rows in the buffer, which has room for them all."""
    rows = Rows({"image": batch["image"]}, batch["label"], batch["id"], batch["valid"])
    buffer = jax.jit(rig.buffer.insert)(state.buffer, mesh_lib.shard_rows(rig.mesh, rows), jax.random.key(0))
    return dataclasses.replace(state, buffer=buffer)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_fisher_information_is_that_of_a_loop_over_rows(devices, mesh_of):
    rig = Rig(mesh_of(devices), make_strategy("ewc"))
    state, batches = rig.state(), [make_batch(0), make_batch(1)]
    params = jax.device_get(state.params)
    total, rows = jax.tree.map(np.zeros_like, params), 0

    def likelihood(params, image, label):
        logits = rig.model.apply(params, {}, image / np.float32(255), train=False)[0]["logits"]
        return jax.nn.log_softmax(logits)[0, label]

    for batch in batches:
        for i in np.flatnonzero(batch["valid"]):
            value, grads = jax.value_and_grad(likelihood)(params, batch["image"][i : i + 1], batch["label"][i])
            total = jax.tree.map(lambda s, g, p=value: s + jnp.exp(p) * g**2, total, grads)
            rows += 1
    ended = end_of_task(rig, state, batches)
    fisher = jax.tree.map(lambda s: s / rows, total)
    close(ended.strategy_state["fisher"], fisher, rtol=1e-4)
    close(ended.strategy_state["pulled"], jax.tree.map(np.multiply, fisher, params), rtol=1e-4)


@pytest.mark.parametrize("online", [True, False])
def test_ewc_over_two_tasks(online, mesh_of):
    """The pull at weights w after tasks that ended at v1 and v2, against the sum of the penalties' gradients."""
    rig = Rig(mesh_of(2), make_strategy("ewc", {"online": online, "gamma": 0.5, "strength": 1.0}))
    fishers, weights = [], []
    state = rig.state()
    for task in (0, 1):
        weights.append(jax.device_get(rig.new_weights(jax.random.key(task))[0]))
        single = end_of_task(rig, rig.state(params=weights[-1]), [make_batch(task)])
        fishers.append(jax.device_get(single.strategy_state["fisher"]))
        state = end_of_task(
            rig, dataclasses.replace(state, params=rig.state(params=weights[-1]).params), [make_batch(task)]
        )
    own = state.strategy_state
    w = jax.device_get(rig.new_weights(jax.random.key(7))[0])
    found = jax.tree.map(lambda w, f, p: f * w - p, w, own["fisher"], own["pulled"])

    def expected(w, f1, f2, v1, v2):
        return (0.5 * f1 + f2) * (w - v2) if online else f1 * (w - v1) + f2 * (w - v2)

    close(found, jax.tree.map(expected, w, *fishers, *weights), rtol=1e-4)


@pytest.mark.parametrize("devices", [1, 4])
def test_icarl_classifies_by_the_nearest_mean_of_what_is_stored(devices, mesh_of):
    rig = Rig(mesh_of(devices), make_strategy("icarl"))
    batch = make_batch(0, (0, 1, 3))
    state = remember(rig, rig.state(), batch)
    ended = end_of_task(rig, state)
    own = jax.device_get(ended.strategy_state)
    valid = batch["valid"]  # the buffer has room for all of them
    features = rig.model.apply(ended.params, {}, batch["image"] / np.float32(255), train=False)[0]["features"]
    features = np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))
    means = {k: features[valid & (batch["label"] == k)].mean(0) for k in np.unique(batch["label"][valid])}
    assert own["known"].tolist() == [k in means for k in range(K)]
    query = np.random.default_rng(0).random((20, features.shape[1])).astype(np.float32)
    scores = rig.strategy.scores({"features": jnp.asarray(query), "logits": jnp.zeros((20, K))}, own)
    unit = query / np.linalg.norm(query, axis=1, keepdims=True)
    for row, q in zip(np.asarray(scores), unit, strict=True):
        nearest = min(means, key=lambda k: np.linalg.norm(q - means[k] / np.linalg.norm(means[k])))
        assert row.argmax() == nearest


@pytest.mark.parametrize("devices", [1, 4])
def test_bic_finds_the_best_correction_of_the_held_out_rows(devices, mesh_of):
    """Against SciPy's minimum of the balanced CE over the held-out rows, in task 1; without old classes, none."""
    rig = Rig(mesh_of(devices), make_strategy("bic", {"held_out": 0.6}))
    normalize, batch = make_normalize(SHAPE), make_batch(2, (0, 1, 2, 3), n=32)
    params = jax.tree.map(lambda w: 3 * w, jax.device_get(rig.new_weights(jax.random.key(5))[0]))
    state = rig.state(params=params, task=np.int32(1), strategy_state=own_state("bic", rig))
    state = remember(rig, state, batch)
    ended = end_of_task(rig, state).strategy_state
    rows = only_valid(batch)
    counted = np.asarray(is_held_out(rows.id, 0.6))
    label = rows.label[counted]
    assert len(set(label)) > 2 and 0 < counted.sum() < len(counted)
    logits = np.asarray(rig.model.apply(params, {}, normalize(rows.record["image"]), train=False)[0]["logits"])[counted]

    def loss(theta):
        corrected = np.where(SEEN & ~OLD, theta[0] * logits + theta[1], SCALE * logits + SHIFT)[:, :4].astype(
            np.float64
        )
        each = np.log(np.exp(corrected).sum(1)) - corrected[np.arange(len(label)), label]
        balanced = np.mean([each[label == k].mean() for k in set(label)])
        return balanced + np.sum((theta - [1, 0]) ** 2) / 2 / len(label)  # the prior weighs as much as one row

    best = optimize.minimize(loss, [1.0, 0.0], tol=1e-10)
    for name, before, fitted in (("scale", SCALE, best.x[0]), ("shift", SHIFT, best.x[1])):
        np.testing.assert_allclose(ended[name], np.where(SEEN & ~OLD, fitted, before), atol=2e-3)
    begin = rig.state()
    first = end_of_task(rig, dataclasses.replace(begin, buffer=state.buffer)).strategy_state
    assert (first["scale"] == 1).all() and (first["shift"] == 0).all()
    np.testing.assert_allclose(
        rig.strategy.scores({"logits": jnp.ones((1, K))}, ended)[0], ended["scale"] + ended["shift"], rtol=1e-6
    )


def test_bic_holds_out_the_share_asked_for_of_any_run_of_ids():
    for begin in (0, 12345, 10**9):
        held = np.asarray(is_held_out(jnp.arange(begin, begin + 1000), 0.1))
        assert abs(held.sum() - 100) <= 2


def test_wa_gives_new_classes_the_norm_of_the_old():
    kernel = np.random.default_rng(0).normal(size=(5, K)).astype(np.float32)
    kernel[:, 2:4] *= 3
    new = SEEN & ~OLD
    norm = np.linalg.norm(align(kernel, OLD, new), axis=0)
    assert norm[new].mean() == pytest.approx(norm[OLD].mean(), rel=1e-5)
    np.testing.assert_array_equal(np.asarray(align(kernel, OLD, new))[:, ~new], kernel[:, ~new])
    np.testing.assert_array_equal(align(kernel, np.zeros(K, bool), OLD), kernel)  # the first task


@pytest.mark.parametrize("name", ["lwf", "l2", "wa"])
def test_the_next_step_may_donate_what_a_task_end_left(name, mesh_of):
    rig = Rig(mesh_of(2), make_strategy(name))
    state = end_of_task(rig, rig.state(stored=False))
    pointers = [
        leaf.unsafe_buffer_pointer() for x in jax.tree.leaves(state) for leaf in (s.data for s in x.addressable_shards)
    ]
    assert len(pointers) == len(set(pointers))
    rig.step(rig.stage(state, [make_draw(1)] * rig.strategy.draws), rig.rows(make_batch(0)))


# --- the table of strategies ------------------------------------------------------------------------------------------


def test_rows_of_a_task():
    from jaxcl.data import class_incremental

    labels = np.arange(12) % 6
    scenario = class_incremental(labels, labels, 6, 3)
    rows = {name: [sorted(make_strategy(name).rows(scenario, t)) for t in range(3)] for name in STRATEGIES}
    alone = [sorted(task.train) for task in scenario.tasks]
    assert rows["from_scratch"] == [sorted(x) for x in itertools.accumulate(alone)]
    assert rows["joint"] == [list(range(12)), [], []]
    assert all(found == alone for name, found in rows.items() if name not in ("from_scratch", "joint"))


def test_the_example_of_the_documentation_is_the_file():
    root = pathlib.Path(__file__).resolve().parents[2]
    (example,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "strategies.md").read_text(), re.DOTALL)
    tree = ast.parse((root / "jaxcl" / "strategies" / "der.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node):
            del node.body[0]
    assert ast.dump(ast.parse(example)) == ast.dump(tree)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_documented_with_its_options(name):
    text = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "strategies.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
    assert re.findall(r"`(\w+)`", row.split("|")[4]) == list(default_options(name))


@pytest.mark.parametrize("name", STRATEGIES)
def test_defaults_make_a_strategy(name):
    assert isinstance(make_strategy(name, default_options(name)), Strategy)


def test_mistakes():
    for name, options, message in (
        ("err", {}, "strategy: 'err' is unknown, did you mean er?"),
        ("plain", {}, "strategy: 'plain' is unknown, choose one of "),
        ("der", {"beta": 1.0}, "strategy: der has no option 'beta'; choose one of alpha"),
        ("er", {"alpha": 1.0}, "strategy: er has no option 'alpha'; it has none"),
        ("mir", {"replayed": 0}, "strategies.mir.replayed: 0 is not allowed, give a positive number"),
        ("bic", {"held_out": 1.0}, "strategies.bic.held_out: 1.0 is not allowed, give a share between 0 and 1"),
        ("gdumb", {"epochs": 0}, "strategies.gdumb.epochs: 0 is not allowed, give a positive number"),
    ):
        with pytest.raises(UserError) as info:
            make_strategy(name, options)
        assert str(info.value).startswith(message)


def test_mir_cannot_replay_more_rows_than_a_step_draws():
    config = ConfigDict({"buffer": {"representatives": 64}})
    make_strategy("mir", {"replayed": 64}).check(config)
    with pytest.raises(UserError) as info:
        make_strategy("mir", {"replayed": 99}).check(config)
    assert str(info.value) == ("strategies.mir.replayed: 99 is not allowed, give at most buffer.representatives = 64")


def test_a_strategy_from_outside(tmp_path, monkeypatch):
    (tmp_path / "outside_strategy.py").write_text(
        "from jaxcl.strategies import Strategy\n\n\ndef twice(draws: int = 2) -> Strategy:\n    return Strategy(draws=draws)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert make_strategy("outside_strategy:twice").draws == 2
    assert make_strategy("outside_strategy:twice", {"draws": 3}).draws == 3
    assert default_options("outside_strategy:twice") == {"draws": 2}
    with pytest.raises(UserError, match="strategy: 'outside_strategy:thrice' cannot be imported"):
        make_strategy("outside_strategy:thrice")


def test_a_record_of_outputs_that_are_not_there_is_one_clear_line():
    forgotten = make_strategy("der")._replace(stores_outputs=False)
    with pytest.raises(UserError, match=r"reads the model's output 'logits'; .* set stores_outputs=True"):
        forgotten.stored(np.zeros((2, *SHAPE), np.uint8), {}, {})
