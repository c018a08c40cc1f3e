"""Sources of arrays: what archives hold comes back, and one that is damaged or lies about itself is one clear line."""

import io
import zipfile

import numpy as np
import pytest

from jaxcl.data import array_source, open_source
from jaxcl.data.pairs import open_pairs
from jaxcl.data.sources import base, npz
from jaxcl.errors import UserError
from tests.unit.test_data_sources import _error, _images


def _npz(path, **changes):
    arrays = {"x_train": _images(6), "y_train": np.arange(6) % 3, "x_test": _images(2), "y_test": np.array([2, 0])}
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return arrays


def test_npz_arrays_come_back(tmp_path):
    arrays = _npz(tmp_path / "a.npz")
    train, test = open_source(f"npz:{tmp_path}/a.npz")
    assert train.class_names == ("0", "1", "2") and train.image_shape == (6, 5, 3) and len(test) == 2
    assert train.labels.dtype == np.int32
    np.testing.assert_array_equal(train.labels, arrays["y_train"])
    np.testing.assert_array_equal(train.read(np.array([4, 0, 4])), arrays["x_train"][[4, 0, 4]])


def test_npz_images_without_channels_and_class_names(tmp_path):
    _npz(tmp_path / "a.npz", x_train=_images(6, (6, 5)), x_test=_images(2, (6, 5)), class_names=np.array(list("abcd")))
    train, _ = open_source(f"npz:{tmp_path}/a.npz")
    assert train.image_shape == (6, 5, 1) and train.num_classes == 4
    assert train.read(np.arange(2)).shape == (2, 6, 5, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None, "y_train": None}, "lacks y_train, x_test, give x_train, y_train, x_test, y_test"),
        ({"x_train": _images(6) / 255}, "has x_train of float64, give uint8"),
        ({"x_test": _images(2, (6,))}, "has x_test of shape (2, 6), give [n, H, W] or [n, H, W, C]"),
        ({"x_test": _images(2, (0, 5))}, "has x_test of shape (2, 0, 5), give [n, H, W] or [n, H, W, C]"),
        ({"x_test": _images(2, (6, 6, 3))}, "has images (6, 5, 3) in x_train and (6, 6, 3) in x_test, give one shape"),
        ({"y_train": np.zeros(6)}, "has y_train of float64 and shape (6,), give integers [n]"),
        ({"y_train": np.zeros((6, 1), int)}, "has y_train of int64 and shape (6, 1), give integers [n]"),
        ({"y_test": np.zeros(3, int)}, "has 2 rows in x_test and 3 in y_test, give as many"),
        ({"y_test": np.array([0, -1])}, "has labels -1..0 in y_test, give 0..2"),
        ({"y_test": np.array([0, 10**9])}, "has labels 0..1000000000 in y_test, give 0..7"),
        ({"class_names": np.array(["a", "b"])}, "has labels 0..2 in y_train, give 0..1"),
        (
            {"x_test": _images(0), "y_test": np.zeros(0, int)},
            "has no rows in y_test, give at least one",
        ),
    ],
)
def test_npz_mistakes(tmp_path, changes, message):
    _npz(tmp_path / "a.npz", **changes)
    assert _error(f"npz:{tmp_path}/a.npz") == f"data.source: 'npz:{tmp_path}/a.npz' {message}"


def test_npz_files_that_are_none(tmp_path):
    assert _error(f"npz:{tmp_path}/a.npz").endswith(f"there is no file {tmp_path}/a.npz")
    assert _error(f"npz:{tmp_path}").endswith(
        "lacks x_train.npy, y_train.npy, x_test.npy, y_test.npy, give x_train.npy, y_train.npy, x_test.npy, y_test.npy"
    )
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "empty.npz").touch()
    (tmp_path / "text.npz").write_text("hello")
    _npz(tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:500])
    _npz(tmp_path / "objects.npz", y_train=np.array([object()] * 6))
    for file in ("one.npy", "empty.npz", "text.npz", "cut.npz", "objects.npz"):
        assert "is not an npz file of plain arrays (" in _error(f"npz:{tmp_path}/{file}")


def _member(header, data, name="x_train.npy"):
    """An archive's bytes with one array of a header and of data that need not agree; the others are in order."""
    out, array = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": header})
    others = {"x_test": _images(2), "y_train": np.arange(6) % 3, "y_test": np.array([2, 0])}
    np.savez(out, **others)
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, array.getvalue() + data)
    return out.getvalue()


@pytest.mark.parametrize("shape", [(10**15, 1, 1), (6, 6, 5, 4), (6, 6, 5, 2), (-1, 6, 5), (2**40, 2**40, 2**40)])
def test_an_array_that_claims_more_than_there_is_is_not_allocated(tmp_path, shape):
    """Petabytes, a byte too many or too few: what the header says is compared with the size of the member."""
    (tmp_path / "a.npz").write_bytes(_member(shape, bytes(6 * 6 * 5 * 3)))
    message = _error(f"npz:{tmp_path}/a.npz")
    assert f"(ValueError: x_train.npy claims shape {shape}" in message
    (tmp_path / "a.npz").write_bytes(_member((6, 6, 5, 3), bytes(6 * 6 * 5 * 3)))
    assert len(open_source(f"npz:{tmp_path}/a.npz")[0]) == 6


def test_a_member_whose_own_size_is_a_lie_is_not_allocated(tmp_path):
    """Header and directory of the archive agree on an exabyte, of which the file has 540 bytes."""
    content = bytearray(_member((10**18,), bytes(540)))
    at = content.index(b"PK\x01\x02", content.rindex(b"x_train.npy") - 60)
    header = 128  # of a version 1.0 array
    content[at + 24 : at + 28] = (2**32 - 1).to_bytes(4, "little")
    extra = (1).to_bytes(2, "little") + (8).to_bytes(2, "little") + (10**18 + header).to_bytes(8, "little")
    content[at + 30 : at + 32] = len(extra).to_bytes(2, "little")
    end = at + 46 + len("x_train.npy")
    content[end:end] = extra
    tail = content.rindex(b"PK\x05\x06")
    size = int.from_bytes(content[tail + 12 : tail + 16], "little") + len(extra)
    content[tail + 12 : tail + 16] = size.to_bytes(4, "little")
    (tmp_path / "a.npz").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.getinfo("x_train.npy").file_size == 10**18 + header
    assert "1000000000000000000 bytes that are not there" in _error(f"npz:{tmp_path}/a.npz")


def test_an_encrypted_or_damaged_archive_is_one_line(tmp_path):
    _npz(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    locked = bytearray(whole)
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := whole.find(mark, at + 1)) >= 0:
            locked[at + flags] |= 1
    (tmp_path / "a.npz").write_bytes(locked)
    assert "x_train.npy is encrypted" in _error(f"npz:{tmp_path}/a.npz")
    for end in (0, 30, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        (tmp_path / "a.npz").write_bytes(whole[:end])
        assert "is not an npz file of plain arrays (" in _error(f"npz:{tmp_path}/a.npz")
    for at in range(0, len(whole), 7):  # whatever byte is wrong: it reads, or it is one line
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        (tmp_path / "a.npz").write_bytes(damaged)
        try:
            open_source(f"npz:{tmp_path}/a.npz")
        except UserError as error:
            assert "\n" not in str(error)


def test_what_does_not_fit_into_memory_is_not_allocated(tmp_path, monkeypatch):
    """An archive of zeros is a thousandth of what it holds."""
    zeros = np.zeros((20_000, 8, 8), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", **dict.fromkeys(("x_train", "x_test"), zeros), y_train=[0], y_test=[0])
    monkeypatch.setattr(npz, "free_memory", lambda: 10**6)
    message = _error(f"npz:{tmp_path}/a.npz")
    assert "does not fit into memory (MemoryError: x_train.npy takes 0.00128 GB, 0.001 GB are free)" in message


def test_too_many_classes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "MOST_CLASSES", 3)
    _npz(tmp_path / "a.npz")
    assert open_source(f"npz:{tmp_path}/a.npz")[0].num_classes == 3
    _npz(tmp_path / "a.npz", class_names=np.array(list("abcd")))
    assert _error(f"npz:{tmp_path}/a.npz").endswith("has 4 classes, give at most 3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noto": None}, "lacks noto, give noto, caption, emojitwo, has_emojitwo"),
        ({"noto": np.zeros((3, 4, 4, 3))}, "has noto of float64 (3, 4, 4, 3), give uint8 [n, H, W, 3], and n captions"),
        ({"caption": np.array(["a"])}, "has noto of uint8 (3, 4, 4, 3), give uint8 [n, H, W, 3], and n captions"),
        (
            {"emojitwo": _images(1, (4, 4, 3))},
            "has emojitwo of shape (1, 4, 4, 3), give an image where has_emojitwo is True",
        ),
    ],
)
def test_mistakes_in_an_archive_of_pairs(tmp_path, changes, message):
    arrays = {"noto": _images(3, (4, 4, 3)), "caption": np.array(list("abc")), "emojitwo": _images(2, (4, 4, 3))}
    arrays |= {"has_emojitwo": np.array([True, False, True])} | changes
    np.savez(tmp_path / "a.npz", **{key: value for key, value in arrays.items() if value is not None})
    name = f"emoji:{tmp_path}/a.npz"
    with pytest.raises(UserError) as error:
        open_pairs(name, "styles")
    assert str(error.value) == f"data.source: {name!r} {message}"


def test_array_source():
    images = _images(4)
    source = array_source(images, np.array([0, 1, 1, 0]), ["a", "b"])
    assert len(source) == 4 and source.num_classes == 2
    np.testing.assert_array_equal(source.read(np.array([3, 1])), images[[3, 1]])


def test_a_folder_of_arrays_is_the_archive_of_them_and_mapped_where_it_is_large(tmp_path, monkeypatch):
    _npz(tmp_path / "a.npz", class_names=np.array(list("abcdefghij")))
    with np.load(tmp_path / "a.npz") as archive:
        for key, array in archive.items():
            np.save(tmp_path / f"{key}.npy", array)
    want = open_source(f"npz:{tmp_path}/a.npz")
    for bound in (0, 2**28):
        monkeypatch.setattr(npz, "_MAPPED", bound)
        for source, other in zip(open_source(f"npz:{tmp_path}"), want, strict=True):
            rows = np.arange(len(other))[::-1]
            images = source.read(rows)
            np.testing.assert_array_equal(images, other.read(rows))
            np.testing.assert_array_equal(source.labels, other.labels)
            assert source.class_names == other.class_names and type(images) is np.ndarray and images.flags.writeable
    file = tmp_path / "x_train.npy"
    for damaged in (file.read_bytes()[:-1], b"", b"hello"):
        file.write_bytes(damaged)
        assert f"has a file that is no whole array of NumPy's: {file}" in _error(f"npz:{tmp_path}")
    file.unlink()
    assert _error(f"npz:{tmp_path}").split(", give")[0].endswith("lacks x_train.npy")
