"""The table of references: what holds is told from what does not; every row's config is one that runs."""

import importlib
import json

import numpy as np
import pytest
from scipy import stats

from experiments.pages import page
from experiments.studies import references, small_pack
from experiments.studies.mammoth import mammoth_protocol
from jaxcl.data import array_source
from jaxcl.errors import UserError
from jaxcl.training.config import check_config, default_config

PROTOCOLS = ("split_mnist_mammoth", "permuted_mnist_mammoth", "split_cifar10_small")


def rows(seed, mean, std, n):
    found = np.random.default_rng(seed).normal(mean, std, n)
    return found, {"mean": found.mean(), "std": found.std(ddof=1), "seeds": n}


def test_two_programs_are_equivalent_where_both_one_sided_tests_reject():
    """Against SciPy's Welch test of each border of the margin; and p < 0.05 exactly where the 90 % interval lies within."""
    verdicts = []
    for seed, shift in enumerate(np.linspace(-2.5, 2.5, 21)):
        (a, theirs), (b, ours) = rows(seed, 90, 1.5, 10), rows(100 + seed, 90 + shift, 0.7, 8)
        found = references.compared(theirs, ours)
        above = stats.ttest_ind(b + references.MARGIN, a, equal_var=False, alternative="greater").pvalue
        below = stats.ttest_ind(b - references.MARGIN, a, equal_var=False, alternative="less").pvalue
        assert found["p"] == pytest.approx(max(above, below), rel=1e-6)
        assert found["difference"] == pytest.approx(b.mean() - a.mean())
        within = -references.MARGIN < found["low"] < found["high"] < references.MARGIN
        assert within == (found["p"] < 0.05)
        verdicts.append(within)
    assert 3 < sum(verdicts) < 18


def test_the_table_says_what_is_shown():
    def ours(mean):
        return {"mean": mean, "std": 0.5, "accuracy": [mean] * 10, "seconds": 1.0}

    reference = {name: {"mean": 90.0, "std": 0.5} for name in ("same", "below", "above", "missing")}
    found = {"same": ours(90.2), "below": ours(87.9), "above": ours(95.0)}
    lines = references.table(reference, found, 5).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert [row[8] for row in cells] == ["yes", "not shown", "not shown", ""]
    assert "not run" in lines[3] and cells[0][6] == "+0.20 (-0.31 to +0.71)"


def test_a_reference_is_of_its_own_number_of_seeds():
    reference = {"a": {"mean": 90.0, "std": 0.5}, "b": {"mean": 90.0, "std": 0.5, "accuracy": [1.0] * 20}}
    lines = references.table(reference, {}, 5).splitlines()[2:]
    assert [line.split("|")[3].strip() for line in lines] == ["5", "20"]


def test_the_page_is_that_of_the_files():
    assert references.PAGE.read_text() == page.filled(references.PAGE.read_text(), references.tables())


def test_summary():
    run = {"seconds": 2.0, "devices": {}, "versions": {}}
    found = references.summary([{**run, "average_accuracy": a} for a in (0.5, 0.7)])
    assert (found["mean"], found["std"], found["accuracy"]) == (60.0, 14.142, [50.0, 70.0])


def test_the_reference_is_asked_for_what_our_row_runs(tmp_path):
    images, labels = np.zeros((20, 4, 4), np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "pack.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    config = importlib.import_module("configs.split_cifar10_small").get_config("der_pp-500")
    config.data.source = f"npz:{tmp_path / 'pack.npz'}"
    asked = mammoth_protocol(config)
    assert asked["strategy"] == "der_pp" and asked["options"] == {"alpha": 0.2, "beta": 0.5}
    assert (asked["capacity"], asked["replayed"], asked["batch_size"], asked["learning_rate"]) == (500, 10, 10, 0.03)
    assert asked["tasks"] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert json.loads(json.dumps(asked))["model"] == {"name": "mlp", "hidden": [100, 100], "kernel_init": "xavier"}
    config.data.source = "tfds:mnist"
    with pytest.raises(UserError, match=r"^--source: tfds:mnist is not allowed with --mammoth, give npz:FILE"):
        mammoth_protocol(config)


def test_a_small_pack_holds_the_first_rows_of_each_class():
    images, labels = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1), np.array([0, 0, 1, 0, 1, 1, 0, 2, 1, 0, 0, 1])
    source = array_source(images, labels, ["a", "b", "c"])
    arrays = small_pack.pack(source, source, 2, 1)
    assert arrays["y_train"].tolist() == [0, 0, 1, 1, 2] and arrays["x_train"].ravel().tolist() == [0, 1, 2, 4, 7]
    assert arrays["y_test"].tolist() == [0, 1, 2] and arrays["class_names"].tolist() == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"^--test: 0 is not allowed, give a positive number"):
        small_pack.pack(source, source, 2, 0)
    some = small_pack.pack(source, source, 3, 1, every=2)
    assert some["x_train"].ravel().tolist() == [0, 1, 3, 7] and some["y_train"].tolist() == [0, 0, 0, 1]
    assert some["y_test"].tolist() == [0, 1] and some["class_names"].tolist() == ["a", "c"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_row_has_a_config_and_a_reference(protocol):
    module = importlib.import_module(f"configs.{protocol}")
    reference = page.load(f"{protocol}.reference")
    assert list(reference["rows"]) == list(module.ROWS)
    for row in module.ROWS:
        check_config(module.get_config(row), devices=1)
    with pytest.raises(UserError, match=f"configs/{protocol}.py:er-1: no such row"):
        module.get_config("er-1")


def test_mir_cannot_replay_more_than_is_drawn():
    config = default_config()
    config.strategy, config.buffer.representatives, config.strategies.mir.replayed = "mir", 8, 9
    with pytest.raises(UserError, match=r"^strategies.mir.replayed: 9 is not allowed, give at most buffer"):
        check_config(config, devices=1)
