"""The built-in set: what is in it, and that preparing it survives races and crashes."""

import pathlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jaxcl.data import open_source
from jaxcl.data.sources import digits
from jaxcl.errors import UserError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    digits.prepare(str(folder))
    return str(folder)


def _rows(images, labels):
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def test_every_digit_is_there_once_with_its_label(data_dir):
    train, test = open_source("digits", data_dir)
    original = load_digits()
    images = np.rint(original.images * 255 / 16).astype(np.uint8)
    found = [(s.read(np.arange(len(s))), s.labels) for s in (train, test)]
    assert found[0][0].max() == 255 and train.image_shape == (8, 8, 1)
    assert _rows(np.concatenate([x for x, _ in found]), np.concatenate([y for _, y in found])) == _rows(
        images, original.target
    )


def test_the_split_is_stratified(data_dir):
    train, test = open_source("digits", data_dir)
    per_class = np.bincount(test.labels, minlength=10) / np.bincount(np.r_[train.labels, test.labels], minlength=10)
    np.testing.assert_allclose(per_class, 0.2, atol=0.005)


def test_two_preparations_give_the_same_rows_in_the_same_order(data_dir, tmp_path):
    for a, b in zip(open_source("digits", data_dir), open_source("digits", str(tmp_path)), strict=True):
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.read(np.arange(len(a))), b.read(np.arange(len(b))))


def test_the_loser_of_a_race_uses_the_winners_copy(tmp_path, monkeypatch):
    build, winners = digits._build, []

    def build_while_another_process_wins(folder):
        made = build(folder)
        monkeypatch.setattr(digits, "_build", build)
        winners.append(digits.prepare(str(tmp_path)))
        return made

    monkeypatch.setattr(digits, "_build", build_while_another_process_wins)
    loser = digits.prepare(str(tmp_path))
    assert winners and len(loser.as_data_source("train")) == 1438
    assert [p.name for p in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_an_interrupted_preparation_leaves_nothing_and_is_started_again(tmp_path, monkeypatch):
    build = digits._build

    def killed(folder):
        build(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "_build", killed)
    with pytest.raises(KeyboardInterrupt):
        digits.prepare(str(tmp_path))
    assert list((tmp_path / "digits").iterdir()) == []
    (tmp_path / "digits" / "incomplete.left1234").mkdir()  # as a process that was killed for good would leave
    monkeypatch.setattr(digits, "_build", build)
    assert len(digits.prepare(str(tmp_path)).as_data_source("test")) == 359


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.data_dir: digits cannot be prepared in '.*file' \(Not a directory\)$"):
        digits.prepare(str(tmp_path / "file"))


def test_a_broken_copy_is_named_and_left_alone(tmp_path):
    half = pathlib.Path(tmp_path, "digits", "1.0.0", "half-copied")
    half.parent.mkdir(parents=True)
    half.touch()
    with pytest.raises(UserError, match=f"digits cannot be prepared in .*; remove {half.parent}$"):
        digits.prepare(str(tmp_path))
    assert half.exists()
