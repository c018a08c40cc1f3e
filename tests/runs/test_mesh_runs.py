"""Whole runs whose weights are divided: what they train, save and continue is what other shapes of a mesh do."""

import functools
import json

import jax
import numpy as np
import pytest

from jaxcl.errors import Preempted
from jaxcl.runs import checkpoint
from jaxcl.strategies import make_strategy
from jaxcl.training.loop import train_and_evaluate
from tests import whole as runs
from tests.rig import Rig, make_batch
from tests.unit.test_partition import MLP, sgd

RULES = (
    (r"Dense_\d\.kernel", ("fsdp", "model")),
    (r"Dense_\d\.bias", ("model",)),
    (r"head\.kernel", ("model", None)),
)
SHAPES = (4, 1, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2)


def on(shape, **changes):
    """The small config on a mesh of this shape, and its devices."""
    data, fsdp, model = shape
    sizes = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__model": model}
    config = runs.small(**sizes, **({"mesh__rules": RULES} if fsdp * model > 1 else {}), **changes)
    return {"config": config, "devices": jax.devices()[: data * fsdp * model], "progress": False}


def assert_close(one, other):
    """Weights to rounding, what is discrete exactly, accuracies as nearly as a few rows may tip."""
    runs.assert_same_but_for_rounding(one, other, rtol=1e-3, atol=1e-4)
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (one, other))
    np.testing.assert_allclose(first["accuracy_matrix"], second["accuracy_matrix"], atol=0.02)
    for result in (first, second):
        result["buffer"].pop("bytes") if result["buffer"] else None  # of every copy along `model`
    assert first["buffer"] == second["buffer"]
    return first, second


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__average": 0.9, "eval__metrics": ("nmc",), "optimizer__clip_norm": 1.0},  # of er
        pytest.param({"strategy": "ewc", "optimizer__split_state": True}, marks=pytest.mark.exhaustive),
        pytest.param({"strategy": "icarl"}, marks=pytest.mark.slow),
        pytest.param({"strategy": "bic"}, marks=pytest.mark.slow),
        pytest.param({"strategy": "lwf"}, marks=pytest.mark.exhaustive),
        pytest.param({"strategy": "wa", "microbatches": 2}, marks=pytest.mark.slow),
        pytest.param({"strategy": "gdumb", "strategies__gdumb__epochs": 2}, marks=pytest.mark.slow),
        pytest.param({"buffer__selection__by": "icarl", "finetune__epochs": 1}, marks=pytest.mark.exhaustive),
        pytest.param({"buffer__tier": "host"}, marks=pytest.mark.slow),
        pytest.param({"steps_per_call": 8, "strategy": "der_pp"}, marks=pytest.mark.exhaustive),
        pytest.param({"strategy": "simplecil", "strategies__simplecil__adapt": True}, marks=pytest.mark.exhaustive),
        # A ridge that keeps the solution's rounding that of its sums.
        pytest.param(
            {"strategy": "ranpac", "strategies__ranpac__adapt": True, "strategies__ranpac__ridge": 0.1},
            marks=pytest.mark.slow,
        ),
        pytest.param({"strategy": "slca"}, marks=pytest.mark.exhaustive),
        pytest.param({"strategy": "sharp", "microbatches": 2}, marks=pytest.mark.slow),
        pytest.param({"optimizer__name": "lamb", "freeze": ("Dense_0",), "microbatches": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: changes.get("strategy", "er") + "-" + next(iter(changes)),
)
def test_a_run_with_parts_of_the_weights_is_the_run_with_whole_ones(changes, tmp_path):
    train_and_evaluate(workdir=tmp_path / "whole", **on((4, 1, 1), **changes))
    train_and_evaluate(workdir=tmp_path / "parts", **on((2, 2, 2), **changes))
    _, parts = assert_close(tmp_path / "whole", tmp_path / "parts")
    assert parts["devices"]["mesh"] == {"data": 2, "fsdp": 2, "model": 2}


@pytest.mark.slow
def test_a_run_on_activations_from_loaded_weights_with_parts_is_the_run_with_whole_ones(tmp_path):
    train_and_evaluate(workdir=tmp_path / "first", **on((4, 1, 1), strategy="joint"))
    changes = {"model__init_from": str(tmp_path / "first"), "latent__layer": "Dense_0", "latent__dtype": "float32"}
    train_and_evaluate(workdir=tmp_path / "whole", **on((4, 1, 1), **changes))
    train_and_evaluate(workdir=tmp_path / "parts", **on((2, 2, 2), **changes))
    _, parts = assert_close(tmp_path / "whole", tmp_path / "parts")
    assert parts["latent"]["frozen"] == ["Dense_0"] and parts["devices"]["mesh"]["fsdp"] == 2


@pytest.mark.slow
def test_slow_layers_below_the_memory_learn_with_parts_what_they_learn_with_whole_weights(tmp_path):
    """Activations that are remembered are bytes of floats here: they are compared as the floats that they are."""
    changes = {"latent__layer": "Dense_0", "latent__below": "slow", "latent__dtype": "float32"}
    found = {}
    for shape in ((4, 1, 1), (2, 2, 2)):
        one = on(shape, **changes, optimizer__scales={"Dense_0": 0.1})
        train_and_evaluate(workdir=tmp_path / str(shape), **one)
        arrays = runs.last(tmp_path / str(shape))[1]
        rows = {
            name: np.ascontiguousarray(x).view(np.float32)
            for name, x in arrays.items()
            if name.endswith("record.image")
        }
        found[shape] = arrays | rows
    whole, parts = found.values()
    assert whole.keys() == parts.keys() and np.abs(whole["buffer.record.image"]).max() > 0
    for name, x in whole.items():
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if x.dtype == np.float32 else {"rtol": 0}
        np.testing.assert_allclose(parts[name], x, **tolerance, err_msg=name)


@pytest.fixture(scope="module")
def state_on(mesh_of_shape):
    """`state_on(shape)`: the state of `er` after three steps on a mesh of this shape."""

    @functools.cache
    def make(*shape):
        rig = Rig(mesh_of_shape(*shape), make_strategy("er"), rules=MLP if shape != SHAPES[0] else (), optimizer=sgd)
        state = rig.state()
        for t in range(3):
            state, _ = rig.step(state, rig.rows(make_batch(t)))
        return state

    return make


@pytest.mark.parametrize("saved", [(2, 2, 2), pytest.param((4, 1, 2), marks=pytest.mark.slow)])
def test_a_save_writes_each_number_once_and_loads_on_every_shape_bit_for_bit(saved, state_on, tmp_path):
    state = state_on(*saved)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(checkpoint.name_of(0, False, 3), state, {})
    checkpoints.wait()
    manifest = checkpoint.newest(tmp_path)
    for shape in SHAPES:
        target = checkpoint.abstract(state_on(*shape))
        found = checkpoints.restore(manifest, target)
        jax.tree.map(np.testing.assert_array_equal, found, state)
        assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, found, target))
    checkpoints.close()
    numbers = sum(x.nbytes for x in jax.tree.leaves(state.params))
    written = sum(
        size for name, (size, _) in manifest["files"].items() if name.startswith("params.") and ".z" not in name
    )
    assert written == numbers


@pytest.mark.parametrize(
    "then",
    [(8, 1, 1), pytest.param((1, 4, 2), marks=pytest.mark.slow), pytest.param((2, 1, 1), marks=pytest.mark.slow)],
)
def test_a_stopped_run_goes_on_with_another_shape(then, tmp_path, monkeypatch):
    """Also where rows have other shards: then the buffer is divided anew, and holds what it held."""
    runs.stop_at(monkeypatch, [9])
    with pytest.raises(Preempted):
        train_and_evaluate(workdir=tmp_path, **on((2, 2, 2)))
    _, before = runs.last(tmp_path)
    result = train_and_evaluate(workdir=tmp_path, **on(then))
    steps = [line["step"] for line in runs.lines(tmp_path, "train")]
    assert steps == sorted(steps) and result["devices"]["mesh"] == dict(
        zip(("data", "fsdp", "model"), then, strict=True)
    )
    assert set(before["buffer.id"]) - {-1}
    assert np.isfinite(result["accuracy_matrix"]).all() and result["buffer"]["rows"] == 40


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_run(tmp_path):
    changes = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__model": 2, "mesh__rules": RULES}
    train_and_evaluate(workdir=tmp_path / "one", **on((2, 2, 2)))
    ends = [runs.wait(process) for process in runs.start_all(tmp_path / "two", 2, 4, **changes)]
    assert [status for status, _ in ends] == [0, 0], ends
    one, two = assert_close(tmp_path / "one", tmp_path / "two")
    assert two["devices"]["processes"] == 2 and two["steps"] == one["steps"]
