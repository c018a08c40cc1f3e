"""Reconstruction: the simulated data, records of several tensors through a whole run, the report, mistakes."""

import functools
import importlib

import jax
import numpy as np
import pytest

from jaxcl import report, summaries
from jaxcl.data import open_source
from jaxcl.data.sources import ptychography
from jaxcl.errors import UserError
from jaxcl.models import ptychonn
from jaxcl.training.build import build
from jaxcl.training.loop import train_and_evaluate
from tests.whole import last, lines

SIDE = 16


@pytest.fixture(autouse=True, scope="module")
def few_rows():
    """Scans of 24 and 8 patterns a specimen instead of 512 and 128, simulated once."""
    with pytest.MonkeyPatch.context() as patch:
        few = functools.cache(functools.partial(ptychography.simulate, train_rows=24, test_rows=8))
        patch.setattr(ptychography, "simulate", few)
        yield


def config(**changes):
    made = importlib.import_module("configs.ptychography").get_config("cpu")
    small = {"data.source": f"ptychography:{SIDE}", "data.tasks": 2, "model.options.width": 2, "epochs": 2}
    made.update_from_flattened_dict(small | {name.replace("__", "."): value for name, value in changes.items()})
    made.log_every = 1
    return made


def test_a_pattern_is_the_fourier_transform_of_what_it_shows_but_for_the_noise_of_counting():
    train, _ = open_source(f"ptychography:{SIDE}")
    rows = np.arange(len(train))
    objects = (train.targets["amplitude"] * np.exp(1j * train.targets["phase"]))[..., 0]
    x = np.arange(SIDE)
    squares = ((x[:, None] - 7.5) ** 2 + (x[None, :] - 7.5) ** 2) / SIDE
    beam = np.exp(-squares * SIDE / (2 * (SIDE / 3) ** 2) + 1j * np.pi * squares)
    beam /= np.sqrt((np.abs(beam) ** 2).sum())
    fourier = np.exp(-2j * np.pi * np.outer(x - SIDE // 2, x) / SIDE) / np.sqrt(SIDE)  # zero frequency in the middle
    far = fourier @ (beam * objects) @ fourier.T
    np.testing.assert_allclose((np.abs(far) ** 2).sum((1, 2)), (np.abs(beam * objects) ** 2).sum((1, 2)))
    expected = np.sqrt(ptychography.PHOTONS * SIDE**2) * np.abs(far)
    images = train.read(rows)[..., 0]
    # The root of a Poisson count has deviation 1/2, its rounding adds 1/12 to the variance; 49,152 pixels.
    bright = (expected > 10) & (expected < 250)
    residual = (images - expected)[bright]
    assert abs(residual.mean()) < 0.05 and residual.std() == pytest.approx(np.sqrt(1 / 4 + 1 / 12), rel=0.03)
    assert bright.mean() > 0.5 and (images == 255).mean() < 0.01


def test_data_follow_from_the_seed_and_every_specimen_has_its_material():
    simulate = functools.partial(ptychography.simulate.__wrapped__, SIDE, train_rows=3, test_rows=2)
    (one, test), (same, _), (other, _) = simulate(), simulate(), simulate(seed=1)
    every = np.arange(len(one))
    np.testing.assert_array_equal(one.read(every), same.read(every))
    assert (one.read(every) != other.read(every)).any()
    assert len(test) == 2 * ptychography.SPECIMENS and test.targets["phase"].shape == (len(test), SIDE, SIDE, 1)
    for source in (one, test):
        amplitude, phase = (source.targets[name][..., 0] for name in ("amplitude", "phase"))
        assert amplitude.dtype == np.float32 and (phase <= 0).all() and (amplitude <= 1).all()
        ratio = (ptychography.ABSORPTION / ptychography.SHIFT)[source.labels][:, None, None]
        np.testing.assert_allclose(np.log(amplitude), ratio * phase, rtol=1e-3, atol=1e-5)


def test_errors_are_summed_up_with_the_signs_turned():
    found = summaries.summarize_errors([[1.0, 3.0], [1.5, 2.0]])
    assert found["average_error"] == 1.75 and found["average_incremental_error"] == 1.375
    assert found["forgetting"]["chaudhry"] == 0.5 and found["backward_transfer"]["gem"] == -0.5


def test_records_of_several_tensors_through_a_whole_run(tmp_path, monkeypatch):
    """Rehearsal on 2 devices: stored rows are whole, the loss is the mean over all rows, the report shows the errors.

    PtychoNN has one level here instead of four: it compiles sooner.
    """
    monkeypatch.setattr(ptychonn, "_LEVELS", 1)
    made = config(buffer__share=0.5)
    result = train_and_evaluate(made, tmp_path / "er", devices=jax.devices()[:2], progress=False)
    train, _ = open_source(made.data.source)
    _, arrays = last(tmp_path / "er")

    def of_buffer(name):
        (found,) = [x for key, x in arrays.items() if key.startswith("buffer.") and name in key.rpartition(".")[2]]
        return found

    ids = of_buffer("id")
    there = ids >= 0
    assert there.sum() == result["buffer"]["rows"] > 0
    np.testing.assert_array_equal(of_buffer("image")[there], train.read(ids[there]))
    np.testing.assert_array_equal(of_buffer("label")[there], train.labels[ids[there]])
    for name in ("amplitude", "phase"):
        np.testing.assert_array_equal(of_buffer(name)[there], train.targets[name][ids[there]])

    steps = lines(tmp_path / "er", "train")
    assert steps[-1]["replayed"] == made.buffer.representatives
    for at in steps:
        pooled = (at["rows"] * at["error"] + at["replayed"] * at["replay_error"]) / (at["rows"] + at["replayed"])
        assert at["loss"] == pytest.approx(pooled, rel=1e-4)

    matrix = np.array(result["error_matrix"])
    assert matrix.shape == (2, 2) and matrix[0, 0] < result["untrained_error"][0]
    assert result["average_error"] == pytest.approx(matrix[-1].mean()) and "accuracy_matrix" not in result
    runs = report.load_runs([tmp_path])
    assert f"{result['average_error']:.4f}" in report.table(runs) and "accuracy" not in report.table(runs)
    assert "Error on each task" in report.write_report(runs, tmp_path / "page").read_text()
    classified = report.Run(tmp_path, {**result, "accuracy_matrix": [[1, 0], [1, 1]], "strategy": "er"})
    del classified.result["error_matrix"]
    with pytest.raises(UserError, match="some runs measure accuracy, others error"):
        report.table([*runs, classified])


BAD = {
    "strategy": ({"strategy": "der"}, "der classifies, .* choose one of er, from_scratch, incremental, joint$"),
    "model": ({"model__name": "convnet"}, "convnet does not reconstruct the .*amplitude"),
    "augment": ({"data__augment": ("flip",)}, "data.augment: .*give ()"),
    "scenario": ({"data__scenario": "rotated"}, "data.scenario: 'rotated' is not allowed, .* to be reconstructed"),
    "side": ({"data__source": "ptychography:4"}, "data.source: 'ptychography:4' is not allowed, give a side of 8..128"),
    "no target": ({"data__source": "digits"}, "multiples of 16"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_mistakes_cost_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        build(config(**changes), jax.devices()[:4])
    assert "\n" not in str(error.value)
