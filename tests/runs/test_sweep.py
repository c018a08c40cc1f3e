"""Sweeps: which settings, that the choice never sees the test set, what is run again, mistakes before anything runs."""

import json

import jax
import numpy as np
import pytest

from jaxcl import report
from jaxcl.data import array_source, hold_out
from jaxcl.errors import Diverged, UserError
from jaxcl.search import sweep as sweep_lib
from jaxcl.search.sweep import Range, Sweep, run_sweep
from jaxcl.training import build as experiment
from jaxcl.training import loop
from tests.whole import small

RATES = {"optimizer.learning_rate": (0.01, 0.1)}


def numbered(labels):
    """A source whose image i says i."""
    images = np.arange(len(labels), dtype="<u4").view(np.uint8).reshape(-1, 2, 2, 1)
    return array_source(images, np.asarray(labels), [str(k) for k in range(1 + max(labels))])


def numbers(source):
    return source.read(np.arange(len(source))).reshape(-1, 4).copy().view("<u4")[:, 0]


def test_held_out_rows_are_a_share_of_each_class_and_no_others():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 4], [100, 33, 2, 1]))
    source = numbered(labels)
    rest, held = hold_out(source, 0.1, 3)
    assert sorted([*numbers(rest), *numbers(held)]) == list(range(len(labels)))
    for part in (rest, held):
        np.testing.assert_array_equal(part.labels, labels[numbers(part)])
    assert np.bincount(held.labels, minlength=5).tolist() == [10, 3, 1, 0, 0]  # never a class's only row
    np.testing.assert_array_equal(numbers(hold_out(source, 0.1, 3)[1]), numbers(held))
    assert set(numbers(hold_out(source, 0.1, 4)[1])) != set(numbers(held))
    with pytest.raises(UserError, match="no class has two train rows"):
        hold_out(numbered([0, 1, 2]), 0.5, 0)


@pytest.mark.parametrize("scenario", ["class", "blurry", "permuted"])
def test_validation_rows_stand_in_for_the_test_set(scenario, tmp_path):
    """No row of the test set, and none that any task trains on, however the scenario permutes it."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (140, 4, 4), np.uint8), np.arange(140) % 6
    np.savez(tmp_path / "data.npz", x_train=x[:100], y_train=y[:100], x_test=x[100:], y_test=y[100:])
    config = small(data__source=f"npz:{tmp_path / 'data.npz'}", data__scenario=scenario, data__validation=0.2)
    scenario, train, test = experiment.make_tasks(config)

    def pixels(source, rows):  # sorted: a permutation does not hide an image
        return {np.sort(image.ravel()).tobytes() for image in source.read(rows)}

    trained = set().union(*(pixels(train, task.train) for task in scenario.tasks))
    validated = set().union(*(pixels(test, task.test) for task in scenario.tasks))
    of_train, of_test = ({np.sort(image.ravel()).tobytes() for image in part} for part in (x[:100], x[100:]))
    assert trained | validated == of_train and not trained & validated and not validated & of_test


def test_settings():
    grid = Sweep({"a": (1, 2), "b.c": ("x", "y")}).settings()
    assert [tuple(setting.values()) for setting in grid] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    fields = {"rate": Range(1e-3, 1.0, log=True), "momentum": Range(0.5, 0.9), "width": (16, 32)}
    drawn = Sweep(fields, search="random", trials=200).settings()
    assert drawn[:5] == Sweep(fields, search="random", trials=5).settings()
    assert drawn[:5] != Sweep(fields, search="random", trials=5, trials_seed=1).settings()
    rate, momentum = (np.array([setting[name] for setting in drawn]) for name in ("rate", "momentum"))
    assert rate.min() >= 1e-3 and rate.max() <= 1 and momentum.min() >= 0.5 and momentum.max() <= 0.9
    assert 0.2 < np.mean(rate < 10**-1.5) < 0.8  # uniform in the logarithm: half of them
    assert Sweep({"width": (16, 32)}, search="random", trials=50).settings() in (
        [{"width": 16}, {"width": 32}],
        [{"width": 32}, {"width": 16}],
    )


@pytest.mark.parametrize(
    "sweep, message",
    [
        (Sweep({}), r"sweep.fields: \{\} is not allowed, give at least one config field"),
        (Sweep(RATES, search="bayes"), "sweep.search: 'bayes' is not allowed, give one of grid, random"),
        (Sweep(RATES, metric="loss"), "sweep.metric: 'loss' is not allowed, give one of average_accuracy"),
        (Sweep(RATES, seeds=0), "sweep.seeds: 0 is not allowed"),
        (Sweep(RATES, validation=0.0), "sweep.validation: 0.0 is not allowed"),
        (Sweep(RATES, validation=float("nan")), "sweep.validation: nan is not allowed"),
        (Sweep(RATES, trials="many"), "sweep.trials: 'many' is not allowed, give a whole number"),
        (Sweep(RATES, seeds=1.5), "sweep.seeds: 1.5 is not allowed"),
        (Sweep(RATES, trials_seed=-1), "sweep.trials_seed: -1 is not allowed"),
        (Sweep([("batch_size", (16,))]), r"sweep.fields: \[.*\] is not allowed, give at least one config field"),
        (Sweep({3: (16,)}), "sweep.fields: 3 is not allowed, give names of config fields"),
        (Sweep({"batch_size": "16"}), "give a list of values or a Range"),
        (Sweep({"batch_size": {16: 1}}), "give a list of values or a Range"),
        (Sweep({"batch_size": range(1, 20), "epochs": ()}), "give a list of values or a Range"),
        (Sweep({"batch_size": (16, None)}), "batch_size: None is not allowed, give a whole number"),
        (Sweep({"batch_size": [16] * 1000, "epochs": [1] * 1000}), "a grid of 1000000 settings is not allowed"),
        (Sweep({"batch_size": Range("a", 3)}, search="random"), "give low < high"),
        (Sweep({"buffer": (1, 2)}), "buffer: 1 is not allowed, give a group of fields|sweep.fields: "),
        (Sweep({"seed": (0, 1)}), "sweep.fields: seed is not allowed, the sweep sets it"),
        (Sweep({"batch_size": 32}), "sweep.fields: batch_size = 32 is not allowed, give a list of values or a Range"),
        (Sweep({"optimizer.learning_rate": Range(0.1, 1)}), "a Range, which is not allowed with search = grid"),
        (Sweep({"batch_size": Range(1, 0)}, search="random"), "give low < high"),
        (Sweep({"optimizer.learning_rat": (0.1,)}), "did you mean learning_rate?"),
        (Sweep({"optimiser.momentum": (0.1,)}), 'sweep.fields: Key "optimiser.momentum" cannot be set'),
        (Sweep({"batch_size": (16, "a")}), "sweep.fields: Could not override field 'batch_size'"),
        (Sweep({"batch_size": (16, 32, 33)}), "batch_size: 33 is not allowed, give a multiple of 2 devices"),
        (Sweep({"data.tasks": (5, 11)}), "data.tasks: 11 is not allowed, give 1..10"),
    ],
)
def test_mistakes_are_told_before_anything_runs(sweep, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        run_sweep(small(), sweep, tmp_path, devices=jax.devices()[:2])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_sweep_of_someone_else_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_and_evaluate", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / "sweep.json").write_text('{"sweep": "of my own", "jaxcl": 1}')
    with pytest.raises(UserError, match=rf"^workdir: {tmp_path}/sweep.json is not a file of jaxcl; remove it or"):
        run_sweep(small(), Sweep(RATES), tmp_path, devices=jax.devices()[:2])
    assert (tmp_path / "sweep.json").read_text() == '{"sweep": "of my own", "jaxcl": 1}'
    theirs = tmp_path / "runs" / "validation" / sweep_lib.folder_name({"optimizer.learning_rate": 0.1}) / "seed_0"
    theirs.mkdir(parents=True)
    (theirs / "notes.txt").touch()
    with pytest.raises(UserError, match=rf"^workdir: {theirs} holds notes.txt and no run"):
        run_sweep(small(), Sweep(RATES), tmp_path / "runs", devices=jax.devices()[:2])
    with pytest.raises(UserError, match=r"^seed: 2147483648 is not allowed"):
        run_sweep(small(seed=2**31 - 1), Sweep(RATES, seeds=2), tmp_path / "other", devices=jax.devices()[:2])


def test_the_best_on_validation_data_is_tested_once(tmp_path, monkeypatch):
    """With made-up runs whose accuracy is best for another setting on the test set, and of which one setting diverges."""
    ran = []

    def accuracy(config):
        rate, tested = config.optimizer.learning_rate, not config.data.validation
        return {0.01: (0.5, 0.1), 0.1: (0.4, 0.9)}[rate][tested] + 0.02 * config.seed

    def run(config, folder, **options):
        ran.append(folder.relative_to(tmp_path).as_posix())
        if config.optimizer.learning_rate == 1.0:
            raise Diverged("the loss is nan")
        return {"average_accuracy": accuracy(config)}

    monkeypatch.setattr(loop, "train_and_evaluate", run)
    sweep = Sweep({"optimizer.learning_rate": (0.01, 0.1, 1.0)}, seeds=2)
    found = run_sweep(small(), sweep, tmp_path, devices=jax.devices()[:2])
    assert found["chosen"] == {"optimizer.learning_rate": 0.01}
    assert found["test"]["values"] == pytest.approx([0.1, 0.12])
    assert [x for x in ran if x.startswith("test/")] == [f"test/optimizer.learning_rate=0.01/seed_{s}" for s in (0, 1)]
    table = report.text_table(sweep_lib.rows(found)).splitlines()
    assert len(table) == 6 and "51.00 ± 1.41  chosen" in table[2] and "diverged" in table[4]
    assert "test, trained on all train rows" in table[5] and "11.00 ± 1.41" in table[5]
    with pytest.raises(Diverged, match="all 1 settings diverged; the first: the loss is nan"):
        run_sweep(small(), Sweep({"optimizer.learning_rate": (1.0,)}), tmp_path / "none", devices=jax.devices()[:2])


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    config, devices = small(strategy="incremental", data__tasks=2), jax.devices()[:1]
    first = run_sweep(config, Sweep({"optimizer.momentum": (0.9,)}), tmp_path, devices=devices, progress=False)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(stamps) == 2 and json.loads((tmp_path / "sweep.json").read_text()) == first
    assert run_sweep(config, Sweep({"optimizer.momentum": (0.9,)}), tmp_path, devices=devices, progress=False) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == stamps
    [validation] = report.load_runs([tmp_path / first["settings"][0]["folder"]])
    [test] = report.load_runs([tmp_path / first["test"]["folder"]])
    assert (validation.result["evaluated_on"], test.result["evaluated_on"]) == ("validation", "test")
