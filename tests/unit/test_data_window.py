"""Cutting JPEG files: pixels are those of Pillow within the stated tolerance, the window is the same however it is decoded."""

import io
import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from experiments.studies import imagenet_shaped
from jaxcl.data import resize, window

SIZE = (500, 375)
SHAPE = (64, 64, 3)
MEAN = 0.3  # of the differences of a whole image, of 255


def photograph(seed, size=SIZE):
    """Colours that change slowly, with detail of every scale and noise, as of a photograph."""
    rng = np.random.default_rng(seed)
    return imagenet_shaped.enlarged(rng.integers(0, 256, (6, 8, 3), np.uint8), size, rng)


def file_of(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 92} if kind == "JPEG" else {}) | options)
    return file.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turned by 90 degrees
    return file_of(photograph(5), exif=exif)


FILES = {
    "4:2:0": lambda: file_of(photograph(0), subsampling="4:2:0"),
    "4:4:4": lambda: file_of(photograph(1), subsampling="4:4:4"),
    "grey": lambda: file_of(photograph(2).convert("L")),
    "cmyk": lambda: file_of(photograph(3).convert("CMYK")),
    "progressive": lambda: file_of(photograph(4), progressive=True),
    "turned": turned,
    "odd": lambda: file_of(photograph(6, (333, 257))),
    "large": lambda: file_of(photograph(7, (1501, 1127))),
    "tiny": lambda: file_of(photograph(8, (3, 2))),
    "one": lambda: file_of(photograph(9, (1, 1))),
    "png": lambda: file_of(photograph(10), "PNG"),
    "palette": lambda: file_of(photograph(11).convert("P"), "PNG"),
}


def by_pillow(file, shape, box_of):
    """The plain way: decodes the whole file, whose orientation tag is ignored, and resizes by Pillow."""
    height, width, channels = shape
    image = Image.open(io.BytesIO(file))
    box = box_of(*image.size)
    cut = image.convert(window.MODES[channels]).resize((width, height), Image.Resampling.BILINEAR, box)
    return np.asarray(cut).reshape(shape)


def box_by(seed):
    """The window that a seed chooses, of the size of the file alone."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((len(seed), *seed))))
    return lambda width, height: window.random_box(width, height, rng)


def difference(one, other):
    """The largest and the mean."""
    apart = np.abs(one.astype(int) - other.astype(int))
    return apart.max(), apart.mean()


@pytest.fixture(params=["vectorised", "pillow"])
def resizer(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(resize, "vectorised", lambda: None)
    elif resize.vectorised() is None:
        pytest.skip("cykooz-resizer is not installed")
    return request.param


@pytest.mark.parametrize("shape", [(224, 224, 3), (64, 64, 3), (32, 48, 1), (64, 64, 4)])
@pytest.mark.parametrize("name", FILES)
def test_evaluation_pixels_are_those_of_pillow(name, shape, resizer):
    file = FILES[name]()
    most, mean = difference(window.middle(file, shape), by_pillow(file, shape, window.middle_box))
    exact = resizer == "pillow" or shape[-1] == 4
    assert most <= (0 if exact else resize.TOLERANCE) and mean <= MEAN


@pytest.mark.parametrize("name", FILES)
def test_training_windows_are_chosen_in_the_pixels_of_the_file(name, resizer):
    """Decoded at a fraction, pixels differ as libjpeg's reduction does from the filter; of another window by far more."""
    file = FILES[name]()
    for seed in ((0, 1, 2), (5, 0), (7,)):
        most, mean = difference(window.random(file, SHAPE, seed), by_pillow(file, SHAPE, box_by(seed)))
        assert mean < 2.0
        if name in ("png", "palette", "tiny", "one"):  # never decoded at a fraction
            assert most <= resize.TOLERANCE


def seen(monkeypatch, file, shape, seed):
    """The size at which a file is decoded, the window in it, and the same window in the pixels of the file."""
    found = []
    monkeypatch.setattr(
        window, "resize", lambda image, size, box: found.append((image.size, box)) or image.resize(size)
    )
    window.random(file, shape, seed)
    ((size, box),) = found
    return size, np.array(box), np.array(box_by(seed)(*Image.open(io.BytesIO(file)).size))


def test_a_file_is_decoded_at_the_smallest_fraction_that_still_shrinks(monkeypatch):
    file, scales = FILES["large"](), set()
    for side in (16, 64, 128, 224, 600):
        for seed in range(10):
            (width, height), box, whole = seen(monkeypatch, file, (side, side, 3), (seed,))
            scale = round(1501 / width)
            assert (width, height) == (-(-1501 // scale), -(-1127 // scale))
            np.testing.assert_allclose(box * scale, whole)
            room = min(whole[2] - whole[0], whole[3] - whole[1]) / side
            assert (scale == 1 or scale <= room) and (scale == 8 or room < 2 * scale)
            scales.add(scale)
    assert scales == {1, 2, 4, 8}


def test_evaluation_decodes_the_whole_file(monkeypatch):
    sizes = []
    monkeypatch.setattr(window, "resize", lambda image, size, box: sizes.append(image.size) or image.resize(size))
    window.middle(FILES["large"](), (16, 16, 3))
    assert sizes == [(1501, 1127)]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_truncated_file_is_refused(share, resizer):
    whole = FILES["large"]()
    file = whole[: int(share * len(whole))]
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for cut in (lambda: window.middle(file, SHAPE), lambda: window.random(file, SHAPE, (0,))):
        with pytest.raises(OSError):
            cut()


def test_resizing_agrees_for_any_box_and_size():
    """Enlarged, shrunk, of fractions of pixels and to one pixel; of noise and of a pattern of single pixels."""
    fast = resize.vectorised()
    if fast is None:
        pytest.skip("cykooz-resizer is not installed")
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
    pattern = Image.fromarray((np.indices((60, 80)).sum(0) % 2 * 255).astype(np.uint8))
    for i in range(300):
        image = (noise, pattern)[i % 2]
        left, upper = rng.uniform(0, (79, 59))
        box = left, upper, *rng.uniform((left + 0.5, upper + 0.5), (80, 60))
        size = int(rng.integers(1, 120)), int(rng.integers(1, 120))
        one, other = (np.asarray(f(image, size, box)) for f in (fast, resize.plain))
        assert difference(one, other)[0] <= resize.TOLERANCE


def test_threads_cut_what_one_cuts():
    files = [FILES[name]() for name in ("4:2:0", "odd", "grey")]
    alone = [window.random(files[i % 3], SHAPE, (i,)) for i in range(48)]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(
            pool.map(lambda i: window.random(files[i % 3], SHAPE, (i,)), range(48)), alone, strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_without_the_resizer_pillow_does_it_and_that_is_said_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cykooz_resizer", None)
    resize.vectorised.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "jaxcl"):
            file = FILES["odd"]()
            for _ in range(2):
                found = window.middle(file, SHAPE)
        np.testing.assert_array_equal(found, by_pillow(file, SHAPE, window.middle_box))
        (line,) = (record.getMessage() for record in caplog.records)
        assert line == "data: cykooz-resizer is not installed, Pillow resizes images: cutting them takes longer"
    finally:
        resize.vectorised.cache_clear()
