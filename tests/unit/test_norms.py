"""Every norm against its formulas in NumPy, under masks, on 1, 2, 4 and 8 devices: outputs, running statistics, gradients."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcl.errors import UserError
from jaxcl.mesh import AXIS
from jaxcl.models import NORMS, RowFacts, make_model, make_norm
from jaxcl.strategies import make_strategy
from tests.rig import BATCH, DRAWN, Rig, close, make_batch, make_draw

NEW, OLD, SIDE, C, TASKS, G = (
    16,
    8,
    3,
    4,
    4,
    4,
)  # rows of the new part and of a draw, all devices; rows of a ghost group
NOW = 2
OPTIONS = {
    "ghost": {"rows": G},
    "group": {"groups": 2},
    "bcn": {"groups": 2},
    "ada": {"kappa": 0.4, "strength": 0.3},
    "unmix": {"components": 3},
}
MOMENTUM, EPSILON = 0.9, 1e-5


def rows_of_step():
    """x `[NEW + OLD, SIDE, SIDE, C]`, weights of a sum of outputs, and facts, in the order of one device."""
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, (NEW + OLD, SIDE, SIDE, C)).astype(np.float32)
    valid = rng.random(NEW + OLD) < 0.7
    valid[:4] = False  # with 8 devices, two without a new row; a whole ghost group, but for its replayed rows
    valid[-1] = True
    replayed = np.arange(NEW + OLD) >= NEW
    task = np.where(replayed, rng.integers(0, NOW - 1, NEW + OLD), NOW).astype(np.int32)  # none of task 1
    place = np.where(replayed, np.arange(NEW + OLD) - NEW, np.arange(NEW + OLD)).astype(np.int32)
    of = np.where(replayed, OLD, NEW).astype(np.int32)
    return (
        x,
        rng.normal(size=x.shape).astype(np.float32),
        RowFacts(valid, task, replayed, place, of, np.int32(NOW), NEW),
    )


def made(name, axis_name=AXIS):
    norm = make_norm(name, OPTIONS.get(name, {}), axis_name=axis_name, dtype=jnp.float32, tasks=TASKS)
    return norm.layer(momentum=MOMENTUM, epsilon=EPSILON)


@cache
def variables_of(name):
    """Parameters and statistics that are not those of the beginning."""
    found = made(name).init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, C)), train=False)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda w: (w + rng.normal(0, 0.3, w.shape)).astype(np.float32), found["params"])
    stats = jax.tree.map(
        lambda w: np.asarray(w + rng.uniform(0, 0.3, w.shape), np.float32), found.get("batch_stats", {})
    )
    return params, stats


def by_device(n):
    """The order in which rows lie: of each device its new rows, then its replayed ones."""
    new, old = np.arange(NEW).reshape(n, -1), NEW + np.arange(OLD).reshape(n, -1)
    return np.concatenate([new, old], 1).ravel()


def found_on(mesh, name):
    """Outputs, new statistics (their mean over the devices), penalty, and gradients of a sum by x and params."""
    x, weight, facts = rows_of_step()
    params, stats = variables_of(name)
    order = by_device(mesh.size)
    specs = RowFacts(*[P(AXIS)] * 5, P(), NEW)
    whole = jax.tree.map(lambda leaf: leaf[order] if np.ndim(leaf) else leaf, facts)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(), P(AXIS), P(AXIS), specs),
        out_specs=(P(AXIS), P(), P(), (P(), P(AXIS))),
        check_vma=False,
    )
    def run(params, stats, x, weight, facts):
        def value(params, x):
            out, updates = made(name).apply(
                {"params": params, "batch_stats": stats},
                x,
                train=True,
                mask=facts,
                mutable=["batch_stats", "penalties"],
            )
            penalty = sum(jax.tree.leaves(updates.get("penalties", {})), jnp.float32(0))
            total = jnp.sum(jnp.where(facts.valid[:, None, None, None], out * weight, 0)) + penalty / mesh.size
            return total, (out, updates.get("batch_stats", {}), penalty)

        grads, (out, stats, penalty) = jax.grad(value, (0, 1), has_aux=True)(params, x)
        return out, jax.lax.pmean(stats, AXIS), penalty, (jax.lax.psum(grads[0], AXIS), grads[1])

    back = np.argsort(order)
    out, stats, penalty, (of_params, of_x) = jax.device_get(jax.jit(run)(params, stats, x[order], weight[order], whole))
    return out[back], stats, penalty, of_params, of_x[back]


def scaled(x, mean, var, params):
    return (x - mean) / np.sqrt(var + EPSILON) * params["scale"] + params["bias"]


def moments(x):
    return x.mean((0, 1, 2)), x.var((0, 1, 2))


def followed(stats, mean, var, speed=1 - MOMENTUM):
    return {"mean": stats["mean"] + speed * (mean - stats["mean"]), "var": stats["var"] + speed * (var - stats["var"])}


def oracle_sync(x, facts, params, stats):
    mean, var = moments(x[facts.valid])
    return scaled(x, mean, var, params), followed(stats, mean, var), 0.0


def by_groups(x, facts, params, stats, groups, keep_empty):
    out, means, variances = np.zeros_like(x), [], []
    for group in groups:
        rows = group[facts.valid[group]]
        mean, var = moments(x[rows]) if len(rows) else (stats["mean"], stats["var"])
        out[group] = scaled(x[group], mean, var, params)
        if len(rows) or keep_empty:
            means.append(mean)
            variances.append(var)
    return out, followed(stats, np.mean(means, 0), np.mean(variances, 0)), 0.0


def oracle_ghost(x, facts, params, stats):
    count = NEW // G
    new, old = np.arange(NEW).reshape(count, -1), NEW + np.arange(OLD).reshape(count, -1)
    return by_groups(x, facts, params, stats, np.concatenate([new, old], 1), keep_empty=True)


def oracle_split(x, facts, params, stats):
    return by_groups(x, facts, params, stats, [np.arange(NEW), np.arange(NEW, NEW + OLD)], keep_empty=False)


def grouped_channels(x, count):
    each = x.reshape(len(x), SIDE, SIDE, count, -1)
    return (
        (each - each.mean((1, 2, 4), keepdims=True)) / np.sqrt(each.var((1, 2, 4), keepdims=True) + EPSILON)
    ).reshape(x.shape)


def oracle_group(x, facts, params, stats, count=2):
    return grouped_channels(x, count) * params["scale"] + params["bias"], stats, 0.0


def oracle_bcn(x, facts, params, stats):
    rows = x[facts.valid]
    var = np.square(rows - stats["mean"]).mean((0, 1, 2))
    new = followed(stats, rows.mean((0, 1, 2)), var)
    x = (x - new["mean"]) / np.sqrt(new["var"] + EPSILON) * params["batch_scale"] + params["batch_bias"]
    return grouped_channels(x, 2) * params["scale"] + params["bias"], new, 0.0


def oracle_ada(x, facts, params, stats):
    counts = np.array([np.sum(facts.valid & (facts.task == t)) for t in range(NOW + 1)])
    share = np.exp(params["phi"][: NOW + 1]) + counts
    share /= share.sum()
    weight = np.where(facts.valid, share[facts.task] / np.maximum(counts, 1)[facts.task], 0)
    assert weight.sum() < 0.95  # a task has no row
    mean = weight @ x.mean((1, 2))
    var = weight @ np.square(x - mean).mean((1, 2))
    kappa, m = OPTIONS["ada"]["kappa"], 1 - MOMENTUM
    eta = stats["eta"] / (stats["eta"] + (1 - m) ** kappa)
    new = followed(stats, mean, var, eta)
    apart = np.mean(np.square(mean - new["mean"])) + np.mean(np.square(var - new["var"]))
    return scaled(x, mean, var, params), {**new, "eta": eta}, OPTIONS["ada"]["strength"] * apart


def oracle_unmix(x, facts, params, stats):
    mean, var = x.mean((1, 2)), x.var((1, 2))
    means, variances = stats["means"], stats["vars"]

    def unit(v):
        return v / np.linalg.norm(v, axis=1, keepdims=True)

    p = np.exp(unit(mean) @ unit(means).T / 0.07)
    p = (p / p.sum(1, keepdims=True))[..., None]
    mixed = (1 - p) * means + p * mean[:, None]
    mine = mixed.mean(1)
    its = ((1 - p) * variances + p * var[:, None]).mean(1) + (mixed**2).mean(1) - mine**2
    v = facts.valid
    new = {
        "means": means + (1 - MOMENTUM) * (p * (mean[:, None] - means))[v].mean(0),
        "vars": variances + (1 - MOMENTUM) * (p * (var[:, None] - variances))[v].mean(0),
    }
    return scaled(x, mine[:, None, None], its[:, None, None], params), new, 0.0


ORACLES = {
    "sync": oracle_sync,
    "ghost": oracle_ghost,
    "split": oracle_split,
    "group": oracle_group,
    "layer": partial(oracle_group, count=1),
    "bcn": oracle_bcn,
    "ada": oracle_ada,
    "unmix": oracle_unmix,
}


@pytest.mark.parametrize("name", ORACLES)
def test_a_norm_is_its_formula_on_any_number_of_devices(name, mesh_of):
    """Outputs of valid rows, running statistics and penalty against NumPy; gradients on one device against differences,
    and on several devices against those of one."""
    x, weight, facts = rows_of_step()
    params, stats = variables_of(name)
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, stats))
    expected, new_stats, penalty = ORACLES[name](x.astype(np.float64), facts, *tree)
    one = found_on(mesh_of(1), name)
    for n in (1, 2, 4, 8):
        out, stats_n, penalty_n, of_params, of_x = one if n == 1 else found_on(mesh_of(n), name)
        np.testing.assert_allclose(out[facts.valid], expected[facts.valid], rtol=2e-4, atol=2e-4)
        close(stats_n, jax.tree.map(np.float32, new_stats), rtol=1e-4, atol=1e-5)
        assert penalty_n == pytest.approx(penalty, rel=1e-4)
        assert not of_x[~facts.valid].any()
        close((of_params, of_x), one[3:], rtol=1e-3, atol=2e-4)

    rng = np.random.default_rng(2)
    way, step = rng.normal(size=x.shape) * facts.valid[:, None, None, None], 1e-5

    def value(x):
        out, _, penalty = ORACLES[name](x, facts, *tree)
        return np.sum((out * weight)[facts.valid]) + penalty

    if name not in ("bcn", "ada", "unmix"):  # these stop gradients, which differences do not
        slope = (value(x + step * way) - value(x - step * way)) / (2 * step)
        assert np.sum(one[4] * way) == pytest.approx(slope, rel=2e-3)


def test_there_is_an_oracle_of_every_norm():
    assert set(ORACLES) == set(NORMS) - {"local"}


@pytest.mark.parametrize(
    "norm",
    ["ghost", "split", "ada", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("unmix", "bcn", "group"))],
)
def test_a_step_with_replayed_rows_is_the_same_on_any_number_of_devices(norm, mesh_of):
    """The whole step, from which the norms are told of tasks, parts and places."""
    found = {}
    for n in (1, 2, 8):
        options = OPTIONS.get(norm, {}) | ({"rows": 4} if norm == "ghost" else {})
        network = {"norm": norm, "norm_options": options}
        rig = Rig(mesh_of(n), make_strategy("er"), "mlp_norm", network=network)
        state = rig.stage(rig.state(stored=False, task=np.int32(1)), [make_draw(1)])
        after, metrics = rig.step(state, rig.rows(make_batch(0)))
        found[n] = jax.device_get((after.params, after.batch_stats, metrics))
    close(found[2], found[1], rtol=1e-4, atol=2e-5)
    close(found[8], found[1], rtol=1e-4, atol=2e-5)


def test_ghost_on_one_device_is_local_on_as_many_as_it_has_groups(mesh_of):
    found = []
    for n, network in ((4, {"norm": "local"}), (1, {"norm": "ghost", "norm_options": {"rows": BATCH // 4}})):
        rig = Rig(mesh_of(n), make_strategy("er"), "mlp_norm", network=network)
        state = rig.stage(rig.state(stored=False), [make_draw(1)])
        after, _ = rig.step(state, rig.rows(make_batch(0)))
        params = {k.replace("MaskedBatchNorm", "GhostNorm"): v for k, v in after.params.items()}
        stats = {k.replace("MaskedBatchNorm", "GhostNorm"): v for k, v in after.batch_stats.items()}
        found.append(jax.device_get((params, stats)))
    # `local` takes the square of the mean from the mean of squares, which on few valid rows leaves rounding of 1e-5.
    close(*found, rtol=1e-4, atol=2e-5)


def test_ghost_groups_lie_on_one_device_where_they_can(mesh_of):
    """Two collectives a norm where a group crosses the devices' borders, none where it does not."""

    def messages(n):
        x, _, facts = rows_of_step()
        params, stats = variables_of("ghost")
        specs = RowFacts(*[P(AXIS)] * 5, P(), NEW)

        @partial(jax.shard_map, mesh=mesh_of(n), in_specs=(P(AXIS), specs), out_specs=P(AXIS), check_vma=False)
        def forward(x, facts):
            variables = {"params": params, "batch_stats": stats}
            return made("ghost").apply(variables, x, train=True, mask=facts, mutable=["batch_stats"])[0]

        return jax.jit(forward).lower(x, facts).as_text().count("stablehlo.all_reduce")

    assert [messages(n) for n in (1, 2, 4, 8)] == [0, 0, 0, 2]  # four groups


def test_a_penalty_is_a_term_of_the_loss(mesh_of):
    """That of AdaB2N at a step of `er` and of `er_ace`, whose two means are taken apart."""
    network = {"norm": "ada", "norm_options": {"strength": 0.5}}
    for strategy in ("er", "er_ace"):
        losses = {}
        for strength in (0.0, 0.5, 1.0):
            network["norm_options"] = {"strength": strength}
            rig = Rig(mesh_of(2), make_strategy(strategy), "mlp_norm", network=network)
            state = rig.stage(rig.state(stored=False, task=np.int32(1)), [make_draw(1, classes=(0, 1))])
            losses[strength] = float(rig.step(state, rig.rows(make_batch(0, (2, 3))))[1]["loss"])
        assert losses[0.5] - losses[0.0] > 0.01
        assert losses[1.0] - losses[0.0] == pytest.approx(2 * (losses[0.5] - losses[0.0]), rel=1e-3)


def test_evaluation_needs_no_facts_and_rows_do_not_meet():
    x, _, _ = rows_of_step()
    for name in NORMS:
        params, stats = variables_of(name)
        layer, variables = made(name, None), {"params": params, "batch_stats": stats}
        together = layer.apply(variables, x, train=False)
        np.testing.assert_allclose(together[3:4], layer.apply(variables, x[3:4], train=False), rtol=1e-5, atol=1e-5)


def test_weights_are_standardised_and_a_models_convolutions_are():
    model = make_model("convnet", 3, options={"width": 2, "norm": "bcn", "norm_options": {"groups": 2}})
    variables = model.init(jax.random.key(0), (8, 8, 3))
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    out, _ = model.apply(**variables, images=images, train=False)
    kernels = [name for name in variables["params"] if "StandardisedConv" in name]
    assert len(kernels) == 3
    moved = dict(variables["params"])
    for name in kernels:  # shift and scale of a filter leave no trace
        moved[name] = {"kernel": 3 * moved[name]["kernel"] + 1}
    again, _ = model.apply(moved, variables["batch_stats"], images=images, train=False)
    np.testing.assert_allclose(again["logits"], out["logits"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "goast"}, "model.options.norm: 'goast' is not allowed, give one of ada, bcn"),
        (
            {"norm": "ghost", "norm_options": {"row": 2}},
            "norm_options.row: ghost has no such option, did you mean rows?",
        ),
        ({"norm": "ghost", "norm_options": {"rows": 0}}, "norm_options.rows: 0 is not allowed, give a positive int"),
        (
            {"norm": "ada", "norm_options": {"kappa": 2.0}},
            "norm_options.kappa: 2.0 is not allowed, give a number from 0 to 1",
        ),
        ({"norm": "ada", "norm_options": {"tasks": 2}}, "norm_options.tasks: ada has no such option"),
        ({"norm_options": 3}, "model.options.norm_options: 3 is not allowed, give a group of options"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        make_model("convnet", 3, options=options)


def test_a_group_that_does_not_divide_is_refused():
    model = make_model("convnet", 3, options={"norm": "ghost", "norm_options": {"rows": 6}})
    with pytest.raises(UserError, match=r"norm_options.rows: 6 is not allowed, give a divisor of batch_size = 16"):
        model.fits(16)
    model = make_model("convnet", 3, options={"width": 4, "norm": "group", "norm_options": {"groups": 3}})
    with pytest.raises(UserError, match=r"norm_options.groups: 3 is not allowed, give a divisor of the 4 channels"):
        jax.eval_shape(lambda key: model.init(key, (8, 8, 1)), jax.random.key(0))
    assert DRAWN % 4 == 0
