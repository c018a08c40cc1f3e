"""Records of a prepared set that turn out to be damaged while a run trains on them."""

import pathlib

import jax
import numpy as np
import pytest

from jaxcl.data import open_source
from jaxcl.data.sources import digits
from jaxcl.errors import DataError
from jaxcl.runs import checkpoint
from jaxcl.training.loop import train_and_evaluate
from tests import whole as runs


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """The folder of the digits, of which the labels are known and images are read batch by batch; its file of train rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    digits.prepare(str(folder))
    opened(folder)
    (file,) = folder.rglob("*train*array_record*")
    return folder, file


def opened(folder):
    return open_source("tfds:digits", str(folder), image_size=8)[0]


def flip(file: pathlib.Path, share: float) -> None:
    raw = bytearray(file.read_bytes())
    raw[int(share * len(raw))] ^= 255
    file.unlink()  # who has it open keeps what was there
    file.write_bytes(raw)


def test_the_record_is_named_and_the_others_are_read(prepared):
    folder, file = prepared
    whole = opened(folder)
    images = whole.read(np.arange(len(whole)))
    flip(file, 0.5)
    train, wrong = opened(folder), []
    for row in range(len(train)):
        try:
            np.testing.assert_array_equal(train.read(np.array([row])), images[row : row + 1])
        except DataError:
            wrong.append(row)
    (row,) = wrong
    others = [0, row, 1]
    name = f"record {row} of tfds:digits, split train in {folder}/digits/1.0.0,"
    for read in (lambda: train.read(np.array(others)), lambda: train.read_random(np.array(others), (0, 1))):
        with pytest.raises(DataError, match=f"^data: {name} cannot be read, is it damaged?") as error:
            read()
        assert "\n" not in str(error.value)
    assert DataError.status == 65


def test_the_run_is_saved_and_goes_on_when_the_data_are_whole_again(prepared, tmp_path):
    folder, file = prepared
    config = runs.small(seed=3, data__source="tfds:digits", data__data_dir=str(folder), data__image_size=8)
    content, devices = file.read_bytes(), jax.devices()[:2]
    flip(file, 0.5)
    found = []
    for _ in range(2):  # again at the same place, where there is nothing new to save
        with pytest.raises(DataError, match=r"^data: record \d+ of tfds:digits, split train in "):
            train_and_evaluate(config, tmp_path / "run", devices=devices, progress=False)
        found.append(checkpoint.newest(tmp_path / "run" / "checkpoints")["run"])
    assert found[0] == found[1] and found[0]["step"] > 1 and found[0]["iterator"] is not None
    file.unlink()
    file.write_bytes(content)
    for name in ("run", "whole"):
        train_and_evaluate(config, tmp_path / name, devices=devices, progress=False)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "run")
