"""Calls of many steps: the same run bit for bit, however its steps are divided into calls and its rows reach the devices."""

import json

import jax
import numpy as np
import pytest

from jaxcl.errors import Preempted, UserError
from jaxcl.search.seeds import train_seeds
from jaxcl.training.build import build
from jaxcl.training.loop import train_and_evaluate
from tests import whole

WAYS = {"five": (5, "auto"), "all": (100, "always"), "handed over": (5, "never"), "by itself": (0, "auto")}


def run(folder, devices, **changes):
    train_and_evaluate(whole.small(**changes), folder, devices=jax.devices()[:devices], progress=False)
    return folder


@pytest.mark.parametrize(
    ("devices", "strategy"), [(1, "er"), (8, "er"), pytest.param(8, "der_pp", marks=pytest.mark.exhaustive)]
)
def test_calls_of_any_number_of_steps_are_the_same_run(devices, strategy, tmp_path, mesh_of):
    mesh_of(devices)
    one = run(tmp_path / "one", devices, strategy=strategy, steps_per_call=1)
    for name, (steps, on_device) in WAYS.items():
        changes = {"steps_per_call": steps, "data__on_device": on_device, "epochs": 1}
        whole.assert_same_run(one, run(tmp_path / name, devices, strategy=strategy, **changes))


def test_a_run_stopped_in_a_call_ends_behind_it_and_goes_on_the_same(tmp_path, monkeypatch, mesh_of):
    mesh_of(2)
    expected = run(tmp_path / "expected", 2, steps_per_call=5)
    with monkeypatch.context() as context:
        whole.stop_at(context, (8, 37))
        for border in (10, 40):
            with pytest.raises(Preempted):
                run(tmp_path / "stopped", 2, steps_per_call=5)
            assert whole.saved_step(tmp_path / "stopped" / "checkpoints") == border or border == 40
    whole.assert_same_run(expected, run(tmp_path / "stopped", 2, steps_per_call=5))


def test_a_save_by_number_ends_a_call(tmp_path, mesh_of):
    folder = run(tmp_path / "run", 1, steps_per_call=100, checkpoint__every_steps=7, checkpoint__keep=100)
    steps = {json.loads(path.read_text())["run"]["step"] for path in folder.glob("checkpoints/*/manifest.json")}
    last = max(steps)
    assert set(range(7, last, 7)) <= steps


@pytest.mark.parametrize("on_device", ["always", "never"])
def test_seeds_side_by_side(on_device, tmp_path, mesh_of):
    mesh_of(2)
    found = {}
    for steps in (1, 5):
        config = whole.small(steps_per_call=steps, data__on_device=on_device)
        folders = {seed: tmp_path / f"{steps}-{seed}" for seed in (0, 1)}
        train_seeds(config, folders, together=True, devices=jax.devices()[:2], progress=False)
        found[steps] = folders
    for seed in (0, 1):
        whole.assert_same_run(found[1][seed], found[5][seed])


def test_the_program_updates_the_buffer_in_place(mesh_of):
    """A loop that copied the memory would need room for a second one."""

    def temporaries(capacity):
        config = whole.small(buffer__capacity=capacity, buffer__policy="reservoir", steps_per_call=100)
        parts = build(config, jax.devices()[:2])
        state = parts.new_state(parts.new_weights(jax.random.key(0)))
        assert parts.many_steps is not None and parts.many_steps.rows
        n, b = parts.many_steps.most, config.batch_size
        rows = parts.many_steps.rows + 1
        whole_, each = (
            jax.sharding.NamedSharding(parts.mesh, spec)
            for spec in (jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(None, "data"))
        )
        table = {
            "image": jax.ShapeDtypeStruct((rows, *parts.train.image_shape), np.uint8, sharding=whole_),
            "label": jax.ShapeDtypeStruct((rows,), np.int32, sharding=whole_),
            "id": jax.ShapeDtypeStruct((rows,), np.int32, sharding=whole_),
            "valid": jax.ShapeDtypeStruct((rows,), bool, sharding=whole_),
        }
        batches = {"place": jax.ShapeDtypeStruct((n, b), np.int32, sharding=each), "table": table}
        return parts.many_steps.prepare(state, batches).memory_analysis().temp_size_in_bytes

    assert temporaries(50_000) <= temporaries(1_000) + 10_000


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps_per_call": -1}, "steps_per_call"),
        ({"data__on_device": "sometimes"}, "data.on_device"),
    ],
)
def test_bad_values(changes, field):
    with pytest.raises(UserError, match=field):
        build(whole.small(**changes))
