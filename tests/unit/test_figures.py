"""The figures in the prose of docs and README are those of their result files, and marks that lead nowhere are refused."""

import re

import numpy as np
import pytest

from experiments.pages import configs, figures, normalisation, pretrained, scale
from experiments.pages.page import PLACE, filled


@pytest.mark.parametrize("path", figures.pages(), ids=lambda path: path.name)
def test_a_page_has_the_figures_of_its_result_files(path):
    text = path.read_text()
    assert figures.filled(text) == text


@pytest.mark.parametrize("path", figures.pages(), ids=lambda path: path.name)
def test_prose_that_names_a_result_file_marks_its_figures(path):
    prose = PLACE.sub("", path.read_text())
    named = set(re.findall(r"experiments/results/(\w+)\.json", prose))
    assert named <= {file for _, file, _, _ in figures.FIGURE.findall(prose)}


RESULT = {
    "rate": 0.034141,
    "seconds": [0.9, 0.02, 0.04],
    "rows": 1234567,
    "records": [
        {"name": "one, plain", "loss": [1.0, 2.0]},
        {"name": "two", "size": 3, "loss": [0.1, 0.3]},
        {"name": "two", "size": 4},
    ],
}


@pytest.fixture
def result(monkeypatch):
    monkeypatch.setattr(figures, "_load", {"some": RESULT}.__getitem__)


@pytest.mark.parametrize(
    ("where", "written", "expected"),
    [
        ("rate x100", "9.9", "3.4"),
        ("rate x100", "9", "3"),
        ("seconds median", "9.99", "0.04"),
        ("seconds max", "0.9", "0.9"),
        ("seconds min x1000", "1", "20"),
        ("seconds", "1.00 ± 1.00", "0.32 ± 0.50"),
        ("rows", "1,000", "1,234,567"),
        ("records[name=one, plain].loss", "0.0 ± 0.0", "1.5 ± 0.7"),
        ("records[name=two;size=3].loss x100", "-1 ± 9", "20 ± 14"),
        ("records[loss=;name=two].size", "7", "4"),
    ],
)
def test_a_figure_is_written_as_it_was(where, written, expected, result):
    before, after = (f"it took <!--= some {where} -->{x}, they say." for x in (written, expected))
    assert figures.filled(before) == after == figures.filled(after)


@pytest.mark.parametrize(
    ("where", "written", "words"),
    [
        ("speed", "1", "'speed'"),
        ("rate", "much", "no figure stands behind it"),
        ("seconds", "1.0", "3 numbers do not make 1.0"),
        ("rate", "1.0 ± 0.1", "1 numbers do not make"),
        ("records[name=two].size", "3", "2 records have"),
        ("records[name=three].size", "3", "0 records have"),
    ],
)
def test_a_mark_that_leads_to_no_number_is_refused(where, written, words, result):
    with pytest.raises(ValueError, match=words) as error:
        figures.filled(f"<!--= some {where} -->{written}")
    assert f"some {where}" in str(error.value)


def test_a_mark_may_stand_on_two_lines(result):
    assert figures.filled("<!--= some records[name=one,\nplain].loss -->1 ± 1") == (
        "<!--= some records[name=one,\nplain].loss -->2 ± 1"
    )
    assert np.isclose(figures.value(RESULT, "records[name=two;size=4].size"), 4)


@pytest.mark.parametrize("page", [configs, normalisation, pretrained, scale])
def test_a_page_is_that_of_the_result_files(page):
    text = page.PAGE.read_text()
    assert filled(text, page.parts()) == text, f"run python -m {page.__name__}"


def test_what_depends_on_the_devices_is_the_worst_over_their_numbers():
    def record(norm, devices, parameters, statistics, accuracy_apart):
        return {"norm": norm, "devices": devices, "parameters": parameters, "statistics": statistics} | {
            "accuracy_apart": accuracy_apart
        }

    found = [record("sync", 1, 0, 0, 0), record("sync", 2, 1e-6, 3e-6, 0.01), record("sync", 8, 2e-6, 1e-6, 0.0)]
    assert normalisation.of_devices({"norms": found}).splitlines()[2:] == ["| `sync` | 2.0e-06 | 3.0e-06 | 1.00 |"]


def test_accuracies_lie_under_their_points_and_what_was_not_run_is_empty():
    rows = [("local", 1, 8, 0.5), ("local", 8, 8, 0.25), ("sync", 8, 8, 0.75)]
    found = [{"row": row, "devices": n, "replayed": r, "average_accuracy": [accuracy]} for row, n, r, accuracy in rows]
    assert normalisation.of_norms({"rows": found}).splitlines() == [
        "| norm | 1 device, 8 replayed | 8 devices, 8 replayed |",
        "| --- | --- | --- |",
        "| `local` | 50.00 | 25.00 |",
        "| `sync` |  | 75.00 |",
    ]


def test_the_table_of_latents_has_what_was_measured_of_each_row():
    joint = {"row": "joint", "average_accuracy": [0.8, 0.9], "part_of_joint": 1.0, "memory_bytes": [0, 0]}
    latent = {"row": "latent 1 %", "average_accuracy": [0.6], "average_nmc": [0.5], "memory_bytes": [30720]}
    times = {"images_per_second": [10.0, 12.0, 99.0], "seconds": [7.0, 8.0, 100.0]}
    lines = pretrained.of_rows({"bytes": 3072000, "rows": [joint | times, latent | times]}).splitlines()
    assert lines[2:] == [
        "| joint | 85.00 ± 7.07 | 100 % |  | 0 kB | 0.0 % | 12 | 8 |",
        "| latent 1 % | 60.00 |  | 50.00 | 31 kB | 1.0 % | 12 | 8 |",
    ]


def test_the_table_of_accuracy_by_shape_has_the_forgetting_that_reports_have():
    one = {
        "shape": "4x1x2",
        "row_shards": 4,
        "average_accuracy": [0.2, 0.3],
        "forgetting": [{"chaudhry": 0.1, "mammoth": 0.9}] * 2,
    }
    assert scale.of_accuracy({"rows": [one]}).splitlines()[2:] == ["| 4x1x2 | 4 | 2 | 25.00 ± 7.07 | 10.00 ± 0.00 |"]
