"""Data that a program hands over: the same run in every form, bound to its folder, and one line for what is no data."""

import grain
import jax
import numpy as np
import pytest

import jaxcl
from jaxcl.data import Source, array_source, given_name, given_sources, open_source
from jaxcl.data.sources import digits
from jaxcl.errors import DataError, Preempted, UserError
from tests import whole

CLASSES = ("ant", "bee", "cow", "dog")


def arrays(rows, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % 4
    images = (60 * labels[:, None, None, None] + rng.integers(0, 40, (rows, 4, 4, 1))).astype(np.uint8)
    return images, labels


class Rows:
    """As Grain's sources give them: by number, one at a time."""

    def __init__(self, images, labels, pairs):
        self.images, self.labels, self.pairs = images, labels, pairs

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        assert isinstance(row, int)
        found = {"image": self.images[row], "label": self.labels[row]}
        return tuple(found.values()) if self.pairs else found


FORMS = {
    "arrays": lambda images, labels: (images, labels),
    "without channels": lambda images, labels: (images[..., 0], labels),
    "dict": lambda images, labels: {"images": images, "labels": labels, "class_names": list("0123")},
    "source": lambda images, labels: array_source(images, labels, list("0123")),
    "rows": lambda images, labels: Rows(images, labels, pairs=False),
    "pairs": lambda images, labels: Rows(images, labels, pairs=True),
}


def train(folder, train, test, **changes):
    config = whole.small(data__tasks=2, epochs=2, **changes)
    return jaxcl.train_and_evaluate(config, folder, train=train, test=test, devices=jax.devices()[:2], progress=False)


def test_every_form_of_the_same_data_is_the_same_run(tmp_path):
    """They may even go on with each other's."""
    first = None
    for name, form in FORMS.items():
        result = train(tmp_path / name, form(*arrays(96)), form(*arrays(32, seed=1)))
        first = first or result
        assert result["accuracy_matrix"] == first["accuracy_matrix"] and result["source"] == first["source"]
    assert first["source"].startswith("given:") and first["class_names"] == list("0123")
    assert train(tmp_path / "rows", arrays(96), arrays(32, seed=1))["accuracy_matrix"] == first["accuracy_matrix"]
    assert jaxcl.load(tmp_path / "arrays").predict(arrays(4)[0]).shape == (4, 4)


def test_a_stopped_run_goes_on_with_its_data_alone(tmp_path, monkeypatch):
    data = {"images": arrays(96)[0], "labels": arrays(96)[1], "class_names": CLASSES}, arrays(32, seed=1)
    with pytest.raises(UserError, match=r"^test: its class names are not allowed, give those of train"):
        train(tmp_path / "run", data[0], {**data[0], "class_names": "wxyz"})
    with monkeypatch.context() as patch:
        whole.stop_at(patch, [4])
        with pytest.raises(Preempted):
            train(tmp_path / "run", *data)
    other = {**data[0], "images": data[0]["images"] ^ 1}
    with pytest.raises(UserError, match=r"workdir: .* holds another config's run \(config.data.source is 'given:"):
        train(tmp_path / "run", other, data[1])
    train(tmp_path / "run", *data)
    train(tmp_path / "whole", *data)
    whole.assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert jaxcl.load(tmp_path / "run").class_names == CLASSES


def test_sources_of_grain_and_tfds_are_rows(tmp_path):
    """What TFDS knows of class names comes with its rows."""
    images, labels = arrays(12)
    made = grain.MapDataset.source([{"image": x, "label": y} for x, y in zip(images, labels, strict=True)])
    one, other = given_sources(made, (images, labels))
    assert given_name(one, other) == given_name(other, other)
    builder = digits.prepare(str(tmp_path))
    found = given_sources(builder.as_data_source("train"), builder.as_data_source("test"))
    for mine, theirs in zip(found, open_source("digits", str(tmp_path)), strict=True):
        rows = np.arange(len(theirs))
        np.testing.assert_array_equal(mine.read(rows), theirs.read(rows))
        np.testing.assert_array_equal(mine.labels, theirs.labels)
        assert mine.class_names == theirs.class_names


@pytest.mark.parametrize(
    ("train_rows", "message"),
    [
        (None, "train: missing; give"),
        (7, "train: a int is not allowed, give"),
        (
            (arrays(8)[0].astype(np.float32), arrays(8)[1]),
            "train: images float32 (8, 4, 4, 1) are not allowed, give uint8",
        ),
        ((arrays(8)[0], arrays(9)[1]), "train: labels int64 (9,) are not allowed, give integers [8]"),
        ((arrays(8)[0], arrays(8)[1] - 1), "train: labels -1..2 are not allowed, give 0..3, one a class"),
        ({"images": arrays(8)[0]}, "train: images or labels are missing, give"),
        (
            (np.zeros((8, 5, 4), np.uint8), arrays(8)[1]),
            "test: images of (4, 4, 1) are not allowed, give (5, 4, 1) as in",
        ),
    ],
    ids=str,
)
def test_what_is_no_data_is_one_line(train_rows, message, tmp_path):
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", train_rows, arrays(8))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_row_that_cannot_be_read_is_named(tmp_path):
    rows = Rows(list(arrays(8)[0]), arrays(8)[1], pairs=False)
    rows.images[5] = rows.images[5][:3]
    with pytest.raises(DataError, match=r"^data: row 5 of train is uint8 \(3, 4, 1\), the first uint8 \(4, 4, 1\)"):
        train(tmp_path / "run", rows, arrays(8))


def test_targets_are_part_of_what_is_given(tmp_path):
    images, labels = arrays(8)
    base = array_source(images, labels, CLASSES)
    names = {given_name(base, base)}
    for targets in ({"x": np.zeros((8, 2), np.float32)}, {"x": np.ones((8, 2), np.float32)}):
        source = Source(base.labels, base.image_shape, base.class_names, base.read, None, targets)
        names.add(given_name(source, base))
    assert len(names) == 3
