"""`folder:DIR` and `hf:DIR`: images in files, read bit for bit, and one line for whatever is wrong with them."""

import json
import logging
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxcl.data import open_source
from jaxcl.errors import DataError, UserError

SAVED = pathlib.Path(__file__).resolve().parents[1] / "data" / "hf_saved"  # by save_to_disk of datasets 5.2.0
CLASSES = ("ant", "bee", "cow")


def fill(folder, rows=6, size=(5, 4), mode="RGB", ending="png", seed=0, classes=CLASSES):
    """Writes `rows` images a class, and gives what was written by its file."""
    rng, found = np.random.default_rng(seed), {}
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(rows):
            shape = (size[1], size[0], *((3,) if mode == "RGB" else ()))
            image = rng.integers(0, 255, shape, np.uint8)
            Image.fromarray(image).save(folder / name / f"{i:02}.{ending}")
            found[folder / name / f"{i:02}.{ending}"] = image
    return found


def everything(source):
    return source.read(np.arange(len(source)))


def error(name, **options):
    with pytest.raises((UserError, DataError)) as caught:
        open_source(name, **options)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data.source: ")
    return str(caught.value)


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_train_and_test_come_class_by_class_bit_for_bit(tmp_path, cache_bytes):
    written = {split: fill(tmp_path / split, rows, seed=rows) for split, rows in (("train", 6), ("test", 2))}
    for source, split in zip(open_source(f"folder:{tmp_path}", cache_bytes=cache_bytes), written, strict=True):
        assert source.class_names == CLASSES and source.image_shape == (4, 5, 3)
        np.testing.assert_array_equal(everything(source), list(written[split].values()))
        np.testing.assert_array_equal(source.labels, np.repeat(range(3), len(source) // 3))


def test_without_them_a_fifth_of_every_class_is_for_testing(tmp_path):
    written = fill(tmp_path, rows=10, mode="L")
    train, test = open_source(f"folder:{tmp_path}")
    assert train.image_shape == (4, 5, 1) and np.bincount(train.labels).tolist() == [8, 8, 8]
    assert np.bincount(test.labels).tolist() == [2, 2, 2]
    both = sorted(x.tobytes() for source in (train, test) for x in everything(source))
    assert both == sorted(x.tobytes() for x in written.values())
    again = open_source(f"folder:{tmp_path}")
    np.testing.assert_array_equal(everything(again[1]), everything(test))


def test_images_of_any_size_are_cut_and_of_one_colour_all_are_rgb(tmp_path):
    fill(tmp_path / "train", size=(9, 7))
    fill(tmp_path / "train", size=(20, 30), ending="JPG", mode="L")
    fill(tmp_path / "test", rows=2, size=(12, 12))
    assert "images of several sizes" in error(f"folder:{tmp_path}") and "give data.image_size" in error(
        f"folder:{tmp_path}"
    )
    train, _ = open_source(f"folder:{tmp_path}", image_size=8)
    assert everything(train).shape == (36, 8, 8, 3) and train.read_random is not None
    one, other = (train.read_random(np.arange(4), seed) for seed in ((0, 0), (0, 1)))
    assert one.shape == (4, 8, 8, 3) and (one != other).any()


def test_what_is_no_image_by_its_name_is_left_out_with_a_line(tmp_path, caplog):
    fill(tmp_path, rows=5)
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "ant" / "._00.png").write_text("x")
    (tmp_path / "bee" / "notes.txt").write_text("x")
    with caplog.at_level(logging.WARNING, "jaxcl"):
        train, test = open_source(f"folder:{tmp_path}")
    assert len(train) + len(test) == 15
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"folder:{tmp_path}: 3 files or folders in {tmp_path} left out, no PNG or JPEG: .DS_Store"


def test_mistakes(tmp_path):
    assert "there is no folder" in error(f"folder:{tmp_path}/absent")
    assert "has no folders, give one for each class" in error(f"folder:{tmp_path}")
    fill(tmp_path / "one", rows=1)
    assert "has one image a class" in error(f"folder:{tmp_path}/one")
    fill(tmp_path / "half" / "train")
    assert "has train alone, give train and test" in error(f"folder:{tmp_path}/half")
    fill(tmp_path / "half" / "test", rows=1, classes=("dog",))
    assert len(open_source(f"folder:{tmp_path}/half")[0].class_names) == 4  # of both splits together
    (tmp_path / "none" / "a").mkdir(parents=True)
    assert "has no image" in error(f"folder:{tmp_path}/none")
    Image.fromarray(np.zeros((4, 5), np.uint16)).save(tmp_path / "one" / "ant" / "deep.png")
    assert f"has {tmp_path}/one/ant/deep.png of mode I;16, give images of 8 bits" in error(f"folder:{tmp_path}/one")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "begins as one"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    fill(tmp_path)
    (tmp_path / "bee" / "03.png").write_bytes(content)
    assert f"has {tmp_path}/bee/03.png, which cannot be read, is it damaged?" in error(f"folder:{tmp_path}")


def test_an_image_that_is_cut_off_is_named_when_it_is_read(tmp_path):
    fill(tmp_path / "train", size=(40, 40))
    fill(tmp_path / "test", rows=1, size=(40, 40))
    path = tmp_path / "train" / "cow" / "01.png"
    path.write_bytes(path.read_bytes()[:500])
    assert f"{path} cannot be read, is it damaged?" in error(f"folder:{tmp_path}")
    train, _ = open_source(f"folder:{tmp_path}", cache_bytes=0)
    with pytest.raises(DataError, match=rf"^data: {path} cannot be read, is it damaged\?"):
        everything(train)


# ---- hf ----


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_a_saved_set_is_what_datasets_reads(cache_bytes):
    """dict.json holds what `datasets` itself gave of the set, two files in train, rows chosen and shuffled."""
    expected = json.loads((SAVED / "dict.json").read_text())
    for source, split in zip(open_source(f"hf:{SAVED}/dict", cache_bytes=cache_bytes), ("train", "test"), strict=True):
        assert source.class_names == ("cat", "dog", "emu")
        np.testing.assert_array_equal(everything(source), expected[split]["image"])
        np.testing.assert_array_equal(source.labels, expected[split]["label"])


def test_of_one_saved_split_a_fifth_is_for_testing():
    train, test = open_source(f"hf:{SAVED}/one")
    assert (len(train), len(test)) == (3, 3)  # at least one of every class
    assert open_source(f"hf:{SAVED}/one", image_size=4)[0].read_random is not None


def test_mistakes_of_a_saved_set(tmp_path):
    assert "there is no such folder" in error(f"hf:{tmp_path}/absent")
    assert "holds no set that save_to_disk has made" in error(f"hf:{tmp_path}")
    shutil.copytree(SAVED / "dict", tmp_path / "set")
    arrow = tmp_path / "set" / "train" / "data-00001-of-00002.arrow"
    for content in (arrow.read_bytes()[:200], b"hello"):
        arrow.write_bytes(content)
        assert f"has a file that cannot be read: {arrow}, is it damaged?" in error(f"hf:{tmp_path}/set")
    arrow.unlink()
    assert f"has a file that cannot be read: {arrow}" in error(f"hf:{tmp_path}/set")
    info = tmp_path / "set" / "train" / "dataset_info.json"
    info.write_text(info.read_text().replace("ClassLabel", "Value"))
    assert "give an Image and a ClassLabel, called image and label" in error(f"hf:{tmp_path}/set")
    info.write_text("{")
    assert "dataset_info.json is damaged" in error(f"hf:{tmp_path}/set")
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "more"]}')
    assert "has splits train, more, give a set with train and test" in error(f"hf:{tmp_path}/set")
