"""Every strategy: its update against the formula of its paper written out on one device, and N devices against one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.strategies import STRATEGIES, make_strategy
from jaxcl.strategies.agem import project
from jaxcl.strategies.bic import is_held_out
from jaxcl.strategies.uer import cosines
from tests.rig import DRAWN, RATE, K, Rig, close, make_batch, make_draw

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
    "uer": {"gamma": 3.0},
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
    if name == "sharp":  # of units of every age
        state = rig.strategy.init(params, batch_stats)
        return state | {"age": {layer: jnp.arange(len(x)) % 4 for layer, x in state["age"].items()}}
    return {}


def prepared(mesh, name: str):
    """A rig, and its state in task 1 with rows to replay."""
    rig = rig_of(mesh, name)
    return rig, *waiting(rig, name)


def waiting(rig: Rig, name: str):
    """A state in task 1 with rows to replay, and these; without a buffer to insert into, which these tests don't need."""
    draws = [make_draw(10 + i, logits=True, classes=(0, 1, 2, 3)) for i in range(rig.strategy.draws)]
    state = rig.state(stored=False, task=np.int32(1), strategy_state=own_state(name, rig))
    return rig.stage(state, draws), draws


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


def uer(new, replay, ask, params, old):
    features, kernel = ask(params, new, "features"), params["head"]["kernel"]
    lengths = jnp.sqrt((features**2).sum(1))[:, None] * jnp.sqrt((kernel**2).sum(0))
    return (
        entropy(3 * features @ kernel / lengths, new.label).mean() + entropy(ask(params, replay), replay.label).mean()
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


def slca(new, ask, params, old):
    return entropy(ask(params, new)[:, 2:4], new.label - 2).mean()  # among the classes of the task


FORMULAS = (er_ace, uer, der, der_pp, l2, ewc, lwf, feature_distillation, icarl, bic, dytox, slca)


def icarl_one_head_a_task(new, replay, ask, params, old):
    """Labels among the classes of a row's own task; the old model's answers for all old classes, as ever."""
    losses = []
    for part in (new, replay):
        q, own = 1 / (1 + jnp.exp(-ask(params, part))), part.label[:, None] // 2 == np.arange(K) // 2
        target = jnp.where(OLD, 1 / (1 + jnp.exp(-ask(old, part))), part.label[:, None] == np.arange(K))
        counted = SEEN & (OLD | own)
        losses.append(-jnp.where(counted, target * jnp.log(q) + (1 - target) * jnp.log(1 - q), 0).sum(1))
    return jnp.concatenate(losses).mean()


def dytox_one_head_a_task(new, replay, ask, params, old):
    losses = []
    for part in (new, replay):
        q, own = 1 / (1 + jnp.exp(-ask(params, part))), part.label[:, None] // 2 == np.arange(K) // 2
        target = part.label[:, None] == np.arange(K)
        binary = -jnp.where(own, target * jnp.log(q) + (1 - target) * jnp.log(1 - q), 0).sum(1) / 2
        p, q = (jax.nn.softmax(ask(weights, part)[:, :2] / 3.0) for weights in (old, params))
        losses.append(0.5 * binary + 0.5 * 9.0 * (p * jnp.log(p / q)).mean(1))
    return jnp.concatenate(losses).mean()


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
    follows(*prepared(mesh_of(4), formula.__name__), formula)


def follows(rig: Rig, state, draws, formula):
    """Asserts that a step from this state descends the formula's gradient."""
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


@pytest.mark.parametrize("formula", [icarl_one_head_a_task, dytox_one_head_a_task], ids=lambda f: f.__name__)
def test_one_head_a_task_restricts_the_labels_part(formula, mesh_of):
    name = formula.__name__.partition("_")[0]
    rig = Rig(mesh_of(4), make_strategy(name, OPTIONS.get(name)), loss_classes="task")
    follows(rig, *waiting(rig, name), formula)


def test_a_vector_of_no_length_has_no_angle():
    """Features that a ReLU left at zero, or nearly, and a class without weights: cosines and gradients of 0, others right."""
    features, kernel = np.zeros((3, 4), np.float32), np.random.default_rng(0).normal(size=(4, K)).astype(np.float32)
    features[1:], kernel[:, 2] = [[1, 0, 2, 0], [0, 0, 0, 3e-8]], 0
    found = np.asarray(cosines(features, kernel))
    lengths = np.linalg.norm(features[1]) * np.maximum(np.linalg.norm(kernel, axis=0), 1e-12)
    np.testing.assert_allclose(found, [np.zeros(K), features[1] @ kernel / lengths, np.zeros(K)], rtol=1e-5)
    of_rows, of_classes = jax.grad(lambda *x: entropy(cosines(*x), np.arange(3)).sum(), (0, 1))(features, kernel)
    assert np.isfinite(of_rows).all() and np.isfinite(of_classes).all()
    assert (of_rows[::2] == 0).all() and (of_rows[1] != 0).all() and (of_classes[:, 2] == 0).all()


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
