"""The experiment on memory modes, its page, and the configs around it."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest

from configs import memory_modes_mnist
from experiments.pages import page
from experiments.studies import grid, memory_modes
from experiments.studies.memory_modes import Mode
from jaxcl import report
from jaxcl.errors import UserError
from jaxcl.training.build import build
from jaxcl.training.config import check_config

SEVERAL = ({"mode", "keys"}, {"mode", "replay"}, {"replay", "drawn"})  # N choices have keys; as many drawn of N times


def test_settings_differ_in_what_their_names_say():
    base = memory_modes_mnist.get_config()
    modes = memory_modes.modes([1, 2, 8], ["random", "icarl"])
    apart = memory_modes.changes("icarl", 8)
    modes += [x for _, *pair in apart for x in pair]
    assert len({x.folder for x in modes}) == len(set(modes))
    for mode in modes:
        setting = mode.setting(base.buffer.capacity)
        config = grid.changed(base, setting.fields)
        check_config(config, setting.devices)
        rows = config.buffer.capacity * (1 if config.buffer.memory == "sharded" else mode.count)
        assert rows == base.buffer.capacity * (mode.count if mode.mode == "n_times" else 1)
        assert config.buffer.representatives == (mode.drawn or base.buffer.representatives)
        assert (config.buffer.selection.ways, setting.devices) == ((8, 1) if mode.mode == "ways" else (1, mode.count))
    assert base == memory_modes_mnist.get_config()
    for name, before, after in apart:  # one thing at a time, but where the whole comparison is asked for
        differ = [
            field.name
            for field in dataclasses.fields(Mode)
            if getattr(before, field.name) != getattr(after, field.name)
        ]
        assert len(differ) == 1 or name.startswith("all") or set(differ) in SEVERAL


def results(counts=(1, 8)):
    """As if the experiment had been run."""
    rng, found = np.random.default_rng(0), {}
    apart = memory_modes.changes("icarl", max(counts))
    of_grid = memory_modes.modes(list(counts), ["random", "icarl"])
    for mode in [*of_grid, *(x for _, *pair in apart for x in pair)]:
        buffer = {"rows": 160, "distinct_ids": 150, "overlap": 0.1, "class_histogram": [16] * 9 + [15]}
        runs = [
            {
                "seed": seed, "buffer": buffer, "replay": {"draws_per_epoch": [0, 160]},
                "average_accuracy": rng.random(), "average_incremental_accuracy": rng.random(),
            }
            for seed in range(3)
        ]  # fmt: skip
        found[mode] = {**dataclasses.asdict(mode), **memory_modes.summary(runs)}
    return {"grid": [found[x] for x in of_grid], "effects": memory_modes.effects(apart, found)}


def test_tables_and_picture():
    found = results()
    assert len(memory_modes.grid_table(found["grid"]).splitlines()) == 2 + len(found["grid"])
    first = found["effects"][0]
    text = memory_modes.effect_table(found["effects"]).splitlines()[2]
    assert text.startswith(first["change"]) and f"{100 * np.mean(first['average_accuracy']):.2f} ±" in text
    assert report.png(lambda: memory_modes.picture(found)).startswith(b"\x89PNG")


def test_the_page_shows_what_was_printed():
    """Tables in docs/memory_modes.md are those of experiments/results/memory_modes.json."""
    text = memory_modes.PAGE.read_text()
    assert text == page.filled(text, memory_modes.sections(page.load("memory_modes")))
    assert (page.RESULTS / "memory_modes.png").is_file()


@pytest.mark.parametrize("name", ["dytox_cifar100", "dytox_tinyimagenet-gpu", "dytox_tinyimagenet-cpu"])
def test_configs_of_dytox_build(name, tmp_path):
    """From a file of the data's shape; nothing is compiled."""
    module, _, size = name.partition("-")
    config = importlib.import_module(f"configs.{module}").get_config(*([size] if size else []))
    classes = 200 if size else 100
    labels = np.arange(2 * classes) % classes
    images = np.zeros((len(labels), 32, 32, 3), np.uint8)
    np.savez(tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    config.data.source = f"npz:{tmp_path / 'set.npz'}"
    run = build(config, jax.devices()[:2])
    params = jax.eval_shape(run.new_weights, jax.random.key(0))[0]
    tasks, each = (5, 2) if size == "cpu" else (10, 10)
    assert params["tokens"].shape[0] == tasks == len(run.scenario.tasks)
    assert {len(task.classes) for task in run.scenario.tasks} == {each}
    assert params["divergence"]["bias"].shape == (tasks * (each + 1),)
    assert run.review is not None and run.strategy.selection == "icarl" and run.strategy.draws == 0


def test_a_wrong_size_is_refused():
    with pytest.raises(UserError, match="no such size, choose gpu or cpu"):
        importlib.import_module("configs.dytox_tinyimagenet").get_config("tpu")
