"""How often the devices meet in a training step, by its compiled text; and what travels together arrives as it does alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.bench import hlo
from jaxcl import mesh as mesh_lib
from jaxcl.buffer.exchange.mix import Hops, mix_route
from jaxcl.mesh import AXIS, ROWS, WHOLE, on_mesh
from jaxcl.strategies import make_strategy
from jaxcl.training import step
from jaxcl.training.many import make_many_steps
from tests.rig import Rig, make_batch
from tests.unit.test_buffer_laws import fill, setup

REHEARSAL = {
    "all_reduce": 1,
    "all_gather": 0,
    "all_to_all": 1,
    "collective_permute": 0,
    "reduce_scatter": 0,
    "total": 2,
}
PLAIN = REHEARSAL | {"all_to_all": 0, "total": 1}
SUM_FIRST = REHEARSAL | {"all_reduce": 2, "total": 3}  # what the loss is divided by, known before the forward pass


def counted(program):
    return hlo.counts(hlo.collectives(program.as_text()))


def counts_of(mesh, name, **options):
    rig = Rig(mesh, make_strategy(name), **options)
    return counted(rig.train_step.lower(rig.state(), rig.rows(make_batch(0)))[0].compile())


@pytest.mark.parametrize("devices", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "expected"), {"incremental": PLAIN, "er": REHEARSAL}.items())
def test_rehearsal_adds_one_collective_to_a_plain_step(name, expected, devices, mesh_of):
    assert counts_of(mesh_of(devices), name) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("er", {"memory": {"policy": "class_balanced", "num_classes": 6, "sampling": "class_balanced"}}, REHEARSAL),
        ("er", {"prior": "balanced"}, SUM_FIRST),
        ("der_pp", {}, SUM_FIRST),
        ("der_pp", {"prior": "balanced"}, SUM_FIRST),
        ("er_ace", {}, SUM_FIRST),
    ],
)
def test_counts_of_rows_and_classes_travel_together(name, options, expected, mesh_of):
    assert counts_of(mesh_of(2), name, **options) == expected


@pytest.mark.slow
def test_many_steps_meet_as_often_as_one(mesh_of):
    rig = Rig(mesh_of(2), make_strategy("er"))
    batches = {name: np.stack([x, x]) for name, x in make_batch(0).items()}
    program = make_many_steps(rig.bound, 0, 2, 0).prepare(rig.state(), batches)
    assert counted(program) == REHEARSAL


def test_with_a_large_network_the_draw_does_not_wait_for_the_gradients(monkeypatch, mesh_of):
    monkeypatch.setattr(step, "SMALL", 0)
    assert counts_of(mesh_of(2), "er") == REHEARSAL | {"all_gather": 1, "total": 3}


@pytest.mark.parametrize("most", [2**24, 2**25, 2**31 - 1])
def test_counts_of_any_size_are_exact(most, mesh_of):
    counts = np.array([[most // 4 - 1, 0], [most // 4, 1], [most // 4 - 3, 1], [most // 4, most - 2]], np.int32)

    def both(x):
        return mesh_lib.sum_counts(AXIS, x[0], most), mesh_lib.gather_counts(AXIS, x[0], most)

    total, every = on_mesh(mesh_of(4), both, (ROWS,), (WHOLE, WHOLE))(counts)
    assert total.dtype == every.dtype == jnp.int32
    np.testing.assert_array_equal(total, counts.sum(0))
    np.testing.assert_array_equal(every, counts)


def narrow(per_device, shards, axis):
    """An exchange whose compact route carries few draws."""
    return tuple(mix_route(Hops(shards, shards, n, n), per_device, axis) for n in (1, per_device))


@pytest.mark.parametrize(
    "options",
    [
        {"exchange": f"{__name__}:narrow"},
        pytest.param({"exchange": "balance"}, marks=pytest.mark.slow),
        pytest.param({"policy": "class_random", "sampling": "class_balanced"}, marks=pytest.mark.slow),
        {"exchange": "local"},
    ],
)
def test_draws_that_travel_together_are_those_of_each_alone(options, mesh_of):
    """Whether both fit the compact route, one of them or none; with the sizes of the shards gathered or summed."""
    buffer, insert, sample, place = setup(4, options.pop("policy", "reservoir"), 200, 16, **options)

    def stage(joined):
        return on_mesh(
            mesh_of(4), lambda state, keys: buffer.local.stage(state, keys, joined=joined), (ROWS, WHOLE), ROWS
        )

    together = [stage(joined) for joined in (False, True)]
    for counts in ((9, 9, 9, 9), (12, 12, 2, 6), (0, 0, 0, 3), (0, 0, 0, 0)):
        state = fill(insert, place, buffer.init(), counts, 4)
        for seed in range(4):
            keys = [jax.random.key(seed), jax.random.key(100 + seed)]
            alone = jax.device_get(tuple(sample(state, key) for key in keys))
            for call in together:
                jax.tree.map(np.testing.assert_array_equal, jax.device_get(call(state, keys)), alone)


def test_a_program_is_counted_along_its_longest_way(mesh_of):
    """Of the branches the one with more; of a loop one turn; what a function calls."""

    def function(x, count):
        def turn(i, x):
            return lax.ppermute(x, AXIS, [(0, 1), (1, 0)])

        def twice(x):
            return lax.all_to_all(lax.psum(x, AXIS), AXIS, 0, 0, tiled=True)

        x = lax.cond(count > 3, twice, lambda x: lax.psum(x, AXIS) + 1, x)
        return lax.fori_loop(0, count, turn, x) + lax.all_gather(x, AXIS).sum(0)

    program = on_mesh(mesh_of(2), function, (ROWS, WHOLE), ROWS).lower(np.zeros((4, 2), np.float32), np.int32(4))
    found = hlo.collectives(program.compile().as_text())
    assert hlo.counts(found) == dict.fromkeys(PLAIN, 1) | {"reduce_scatter": 0, "total": 4}
    assert {one.kind: one.where.rsplit(".")[-1] for one in found} == {
        "all-reduce": "twice",
        "all-to-all": "twice",
        "all-gather": "function",
        "collective-permute": "turn",
    }


def test_asynchronous_collectives_are_counted_once():
    text = """HloModule gpu

%wrapped (p: u8[4]) -> u8[4] {
  %p = u8[4]{0} parameter(0)
  ROOT %moved = u8[4]{0} all-to-all(%p), replica_groups={{0,1}}
}

ENTRY %main (a: f32[4], b: u8[4]) -> (f32[4], u8[4]) {
  %a = f32[4]{0} parameter(0)
  %b = u8[4]{0} parameter(1)
  %sum = (f32[4]{0}, s32[]) all-reduce-start(%a)
  %send = ((u8[4]{0}), u8[4]{0}) async-start(%b), calls=%wrapped
  %got = u8[4]{0} async-done(%send)
  %summed = f32[4]{0} all-reduce-done(%sum)
  ROOT %out = (f32[4]{0}, u8[4]{0}) tuple(%summed, %got)
}
"""
    assert hlo.collectives(text) == [
        hlo.Collective("all-reduce", 2, ""),
        hlo.Collective("all-to-all", 1, ""),
    ]
