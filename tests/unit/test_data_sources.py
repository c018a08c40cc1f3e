"""Sources: the same rows come back, from memory and from disk; every user mistake is one clear line."""

import importlib.util
import io
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import dataset_metadata

from jaxcl.data import array_source, open_source, resize, train_batches, window
from jaxcl.data.sources import _encoded
from jaxcl.data.sources import tfds as tfds_source
from jaxcl.errors import UserError


def _images(n, shape=(6, 5, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def _png(image):
    out = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(out, "PNG")
    out.seek(0)
    return out


def _prepare(data_dir, splits, features, supervised_keys=None):
    """Prepares a TFDS set: `splits` maps a name to examples. Its code is unknown to `tfds.builder`, as a stranger's."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        @classmethod
        def get_metadata(cls):
            return dataset_metadata.DatasetMetadata(description="", citation="", tags=[])

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), supervised_keys=supervised_keys
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            yield from enumerate(examples)

    Tiny.name = "tiny_set"
    Tiny(data_dir=data_dir, file_format="array_record").download_and_prepare()


def _image_features(shape=(6, 5, 3), num_classes=4):
    return {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(num_classes=num_classes),
        "id": tfds.features.Text(),
    }


def _examples(images, labels):
    pairs = enumerate(zip(images, labels, strict=True))
    return [{"image": _png(x), "label": int(y), "id": f"row {i}"} for i, (x, y) in pairs]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A prepared set of 600 + 7 rows, more than one decoding chunk; label = first pixel modulo 4."""
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    images = {"train": _images(600), "test": _images(7, seed=1)}
    _prepare(data_dir, {s: _examples(x, x[:, 0, 0, 0] % 4) for s, x in images.items()}, _image_features())
    return data_dir, images


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A user's cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


# ---- TFDS ----


@pytest.mark.parametrize("cache_bytes", [0, 607 * 6 * 5 * 3 - 1, 607 * 6 * 5 * 3])
def test_tfds_rows_keep_image_and_label_together_cached_or_not(tiny, cache_bytes, monkeypatch):
    data_dir, images = tiny
    decoded = []
    monkeypatch.setattr(_encoded, "decode", lambda *a, f=_encoded.decode: decoded.append(1) or f(*a))
    for source, split in zip(open_source("tfds:tiny_set", data_dir, cache_bytes), images, strict=True):
        x = source.read(np.arange(len(source)))
        assert x.dtype == np.uint8 and x.shape == images[split].shape
        assert source.labels.dtype == np.int32 and source.num_classes == 4 and source.image_shape == (6, 5, 3)
        np.testing.assert_array_equal(source.labels, x[:, 0, 0, 0] % 4)
        assert sorted(map(bytes, x)) == sorted(map(bytes, images[split]))
        # In the order asked for, repeats included, on any thread, and none at all.
        asked = np.random.default_rng(0).integers(0, len(source), (8, 20))
        with ThreadPoolExecutor(4) as pool:
            for rows, got in zip(asked, pool.map(source.read, asked), strict=True):
                np.testing.assert_array_equal(got, x[rows])
        assert source.read(np.zeros(0, np.int64)).shape == (0, 6, 5, 3)
    in_memory = cache_bytes >= 607 * 6 * 5 * 3
    assert len(decoded) == 607 if in_memory else len(decoded) > 607


def test_labels_of_a_large_set_are_read_without_decoding_images(tiny, monkeypatch):
    monkeypatch.setattr(_encoded, "decode", lambda *_: pytest.fail("decoded an image"))
    train, _ = open_source("tfds:tiny_set", tiny[0], cache_bytes=0)
    assert len(np.unique(train.labels)) == 4


def test_labels_of_a_large_set_are_read_once(tiny, cache, monkeypatch):
    """The second time from the cache; a torn file is written anew; without a folder to write in they are read every time."""
    kept = tfds_source.label_cache
    reads, cached = [], kept.cached

    def counted(builder, split, rows, read):
        return cached(builder, split, rows, lambda: reads.append(split) or read())

    def labels():
        return [source.labels for source in open_source("tfds:tiny_set", tiny[0], cache_bytes=0)]

    monkeypatch.setattr(kept, "cached", counted)
    first = labels()
    files = sorted(cache.rglob("*.npy"))
    assert [file.name.rpartition("-")[0] for file in files] == ["tiny_set-1.0.0-test-7", "tiny_set-1.0.0-train-600"]
    second = labels()
    assert reads == ["train", "test"] and not list(cache.rglob("*.tmp"))
    for found, expected in zip(second, first, strict=True):
        np.testing.assert_array_equal(found, expected)
    for content in (files[1].read_bytes()[:-4], b""):
        files[1].write_bytes(content)
        np.testing.assert_array_equal(labels()[0], first[0])
        assert reads.pop() == "train" and len(np.load(files[1])) == 600
    (cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    np.testing.assert_array_equal(labels()[0], first[0])
    assert reads == ["train", "test"] * 2


def test_labels_of_another_preparation_are_not_taken_for_these(tmp_path):
    """The same name, version, split and rows in two folders, and prepared anew in one."""
    for label in (0, 1, 2):
        folder = tmp_path / str(label % 2)
        shutil.rmtree(folder, ignore_errors=True)
        _prepare(str(folder), dict.fromkeys(("train", "test"), _examples(_images(3), [label] * 3)), _image_features())
        assert open_source("tfds:tiny_set", str(folder), cache_bytes=0)[0].labels.tolist() == [label] * 3


def test_a_read_does_not_expose_the_cache(tiny):
    train, _ = open_source("tfds:tiny_set", tiny[0])
    before = train.read(np.arange(3))
    train.read(np.arange(3))[:] = 0
    np.testing.assert_array_equal(train.read(np.arange(3)), before)


def test_validation_stands_in_for_a_missing_test_split_and_keys_may_have_other_names(tmp_path):
    def rows(n):
        return [{"picture": _png(x), "kind": 1} for x in _images(n, (4, 4, 1))]

    features = {"picture": tfds.features.Image(shape=(4, 4, 1)), "kind": tfds.features.ClassLabel(names=["a", "b"])}
    splits = {"train": rows(3), "validation": rows(2)}
    _prepare(str(tmp_path), splits, features, supervised_keys=("picture", "kind"))
    train, test = open_source("tfds:tiny_set", str(tmp_path))
    assert (len(train), len(test)) == (3, 2) and test.class_names == ("a", "b")


def test_a_grey_file_in_a_colour_set_is_read_as_colour(tmp_path):
    grey = _images(1, (6, 5))[0]
    out = io.BytesIO()
    Image.fromarray(grey).save(out, "PNG")
    out.seek(0)
    colour = _examples(_images(1), [0])
    splits = {"train": [{"image": out, "label": 1, "id": ""}], "test": colour}
    _prepare(str(tmp_path), splits, _image_features())
    train, _ = open_source("tfds:tiny_set", str(tmp_path))
    np.testing.assert_array_equal(train.read(np.arange(1))[0], np.repeat(grey[..., None], 3, -1))


@pytest.mark.parametrize("vectorised", [True, False])
def test_images_of_any_size_are_cut_in_training_at_random_by_seed_and_row_alone(vectorised, tmp_path, monkeypatch):
    if not vectorised:
        monkeypatch.setattr(resize, "vectorised", lambda: None)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((40, 30), (25, 64), (32, 32))]
    splits = {split: _examples(images, range(3)) for split in ("train", "test")}
    _prepare(str(tmp_path), splits, _image_features((None, None, 3)))
    assert "data.image_size" in _error("tfds:tiny_set", tmp_path)
    train, test = open_source("tfds:tiny_set", str(tmp_path), image_size=16)
    assert train.image_shape == (16, 16, 3) and train.read_random is not None
    for row in range(3):
        (middle,), (label,) = test.read(np.array([row])), test.labels[[row]]
        whole = images[label]
        side = 224 / 256 * min(whole.shape[:2])
        left, upper = (whole.shape[1] - side) / 2, (whole.shape[0] - side) / 2
        box = (left, upper, left + side, upper + side)
        expected = Image.fromarray(whole).resize((16, 16), Image.Resampling.BILINEAR, box)
        atol = resize.TOLERANCE if vectorised else 0
        np.testing.assert_allclose(middle.astype(int), np.asarray(expected, int), rtol=0, atol=atol)

    def epoch(number, **options):
        options = {"batch_size": 2, "epochs": 2, "seed": (5,), "num_threads": 0} | options
        loader = train_batches(train, np.arange(3), **options)
        found = {}
        for t in range(number * loader.steps_per_epoch, (number + 1) * loader.steps_per_epoch):
            batch = loader[t]
            found |= {int(i): x.tobytes() for i, x in zip(batch["id"], batch["image"], strict=True) if i >= 0}
        return found

    assert epoch(0) == epoch(0, batch_size=3)  # the same windows however rows are batched
    assert all(epoch(0)[i] != epoch(1)[i] != epoch(0, seed=(6,))[i] for i in range(3))


def test_random_windows_lie_within_the_image_and_have_the_area_and_shape_they_should():
    rng = np.random.default_rng(0)
    boxes = np.array([window.random_box(400, 300, rng) for _ in range(2000)])
    left, upper, right, lower = boxes.T
    assert (left >= 0).all() and (upper >= 0).all() and (right <= 400).all() and (lower <= 300).all()
    w, h = right - left, lower - upper
    share, ratio = w * h / (400 * 300), w / h
    assert 0.079 < share.min() < 0.1 and 0.9 < share.max() <= 1  # 8 % to 100 %, rounded to pixels
    fits = ~((w == 400) & (h == 300))  # but where no draw fitted
    assert 0.74 < ratio[fits].min() < 0.77 and 1.30 < ratio[fits].max() < 1.35


@pytest.mark.parametrize("name", ["digits", "npz:x.npz"])
def test_only_tfds_sets_are_cut(name):
    with pytest.raises(UserError, match=r"data\.image_size: 16 is not allowed, give None: .* one size"):
        open_source(name, image_size=16)


def _error(name, data_dir=None):
    with pytest.raises(UserError) as info:
        open_source(name, None if data_dir is None else str(data_dir))
    message = str(info.value)
    assert "\n" not in message and len(message) < 320
    assert info.value.__cause__ is None and (info.value.__suppress_context__ or info.value.__context__ is None)
    return message


ALLOWED = "is not allowed, give one of digits, folder, hf, npz, ptychography, tfds or module:name"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("digts", "digits"),
        ("mnist", "tfds:mnist"),
        ("tdfs:mnist", "tfds:mnist"),
        ("npx:a.npz", "npz:a.npz"),
        ("a.npz", "npz:a.npz"),
    ],
)
def test_an_unknown_name_lists_what_is_allowed_and_guesses(name, meant):
    assert _error(name) == f"data.source: {name!r} {ALLOWED}; did you mean {meant}?"


@pytest.mark.parametrize("name", ["", ":", "qqqqqq", "ftp:qqqqqq", "json:"])
def test_an_unknown_name_without_a_likely_meaning(name):
    assert _error(name) == f"data.source: {name!r} {ALLOWED}"


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("npz", "npz:FILE or npz:DIR"),
        ("npz:", "npz:FILE or npz:DIR"),
        ("folder", "folder:DIR"),
        ("hf", "hf:DIR"),
        ("tfds:", "tfds:NAME"),
        ("digits:8", "digits"),
        ("ptychography", "ptychography:SIDE"),
        ("ptychography:big", "ptychography:SIDE"),
        ("ptychography:4", "a side of 8..128 pixels"),
        ("ptychography:" + "9" * 5000, "ptychography:SIDE"),
    ],
)
def test_a_kind_of_source_says_what_it_takes(name, form):
    with pytest.raises(UserError, match=f"is not allowed, give {form}$"):
        open_source(name)


def checkered(*, rest, **_):
    """A source from outside, whose one class has the name `rest`."""
    return (array_source(_images(3), np.zeros(3, int), [rest]),) * 2


def test_a_source_from_outside(tmp_path):
    for rest in ("", "a", "a:b"):
        train, _ = open_source(f"{__name__}:checkered" + (f":{rest}" if rest else ""), str(tmp_path))
        assert train.class_names == (rest,) and len(train) == 3
    assert "module 'json' has no attribute 'nothing'" in _error("json:nothing:x")
    with pytest.raises(UserError, match=r"data\.image_size: 8 is not allowed"):
        open_source(f"{__name__}:checkered", image_size=8)


def test_unknown_tfds_sets(tiny):
    assert "neither a TFDS set nor prepared in" in _error("tfds:qqqqqq", tiny[0])
    assert "; did you mean tfds:cifar10?" in _error("tfds:cifa10", tiny[0])
    assert "; did you mean tfds:tiny_set?" in _error("tfds:tinyset", tiny[0])
    assert "BuilderConfig nope not found" in _error("tfds:mnist/nope", tiny[0])


def test_a_set_that_is_not_prepared_fails_at_once_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = _error("tfds:mnist", tmp_path)
    assert f"not prepared in {tmp_path}/mnist/3.0.1" in message and "TensorFlow" in message


def test_a_failed_download_gives_its_cause_in_the_same_line(tmp_path, monkeypatch):
    def fail(self, **_):
        raise ConnectionError("no route to host\n  a page\n  of details") from OSError("unreachable\nand more")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    assert _error("tfds:mnist", tmp_path).endswith("mnist/3.0.1 and cannot be downloaded (OSError: unreachable)")


def test_images_of_several_sizes_are_refused_before_any_download(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source, "_prepare", lambda *_: pytest.fail("downloaded"))
    message = _error("tfds:imagenet2012", tmp_path)
    assert message == (
        "data.source: 'tfds:imagenet2012' has images of shape (None, None, 3), give data.image_size, or a set whose images"
        " have one size"
    )


def test_a_set_without_labels_lists_its_features(tmp_path):
    row = {"image": _png(_images(1)[0])}
    _prepare(str(tmp_path), {"train": [row], "test": [row]}, {"image": tfds.features.Image(shape=(6, 5, 3))})
    assert _error("tfds:tiny_set", tmp_path).endswith("has features image, give a set with an Image and a ClassLabel")


def test_a_set_without_test_rows_lists_its_splits(tmp_path):
    _prepare(str(tmp_path), {"train": _examples(_images(1), [0])}, _image_features())
    assert _error("tfds:tiny_set", tmp_path).endswith("has splits train, give a set with train and test or validation")


def test_unlabelled_rows_are_refused(tmp_path):
    splits = {"train": _examples(_images(2), [0, 1]), "test": _examples(_images(2), [0, -1])}
    _prepare(str(tmp_path), splits, _image_features())
    assert _error("tfds:tiny_set", tmp_path).endswith("has labels -1..0 in split test, give 0..3")


# ---- npz ----


# ---- the rest ----


def test_importing_the_package_does_not_import_tfds():
    check = "import sys, jaxcl.data; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True).stdout.split()
    assert "jaxcl.data.sources.tfds" not in modules and "jaxcl.data.sources" in modules
    assert not {"tensorflow_datasets", "tensorflow", "flax", "sklearn"} & set(modules)


def test_the_mnist_pack_reads_as_tfds_mnist(packs, tmp_path):
    """Every thirtieth row of it, prepared by the pack's own script."""
    shutil.copy(packs / "prepare.py", tmp_path)
    with np.load(packs / "mnist.npz") as file:
        packed = {name: file[name][::30] for name in file.files}
    np.savez(tmp_path / "mnist.npz", allow_pickle=False, **packed)
    command = [sys.executable, tmp_path / "prepare.py", "mnist", "--tfds", tmp_path / "tfds"]
    subprocess.run(command, check=True, capture_output=True)
    for split, source in zip(("train", "test"), open_source("tfds:mnist", str(tmp_path / "tfds")), strict=True):
        assert source.image_shape == (28, 28, 1) and source.num_classes == 10
        found = source.read(np.arange(len(source)))
        rows, expected = (
            sorted((bytes(x), int(y)) for x, y in zip(*arrays, strict=True))
            for arrays in ((found, source.labels), (packed[f"x_{split}"], packed[f"y_{split}"]))
        )
        assert rows == expected


def test_a_set_without_random_access_names_its_format(tiny, tmp_path):
    # As a set prepared by TensorFlow would be: the format stands in dataset_info.json.
    _prepare(str(tmp_path), {s: _examples(_images(1), [0]) for s in ("train", "test")}, _image_features())
    info = tmp_path / "tiny_set" / "1.0.0" / "dataset_info.json"
    info.write_text(re.sub("array_record", "tfrecord", info.read_text()))
    for file in info.parent.glob("*array_record*"):
        file.rename(str(file).replace("array_record", "tfrecord"))
    assert "is prepared as tfrecord in" in _error("tfds:tiny_set", tmp_path)
