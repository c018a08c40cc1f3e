"""`digits`: the built-in set, scikit-learn's handwritten digits as a TensorFlow Datasets builder.

1,797 real images of 8x8 pixels in 10 classes (the UCI test set of Alpaydin and Kaynak), shipped inside
scikit-learn. It needs neither network nor TensorFlow, so a fresh checkout trains, and tests run, anywhere.
Importing this module imports TFDS, which takes seconds; the registry does so when the set is opened.
"""

import contextlib
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import dataset_metadata

from jaxcl.data.source import Source
from jaxcl.data.sources.base import whole, wrong
from jaxcl.data.sources.tfds import open_builder
from jaxcl.errors import UserError

TEST_FRACTION = 0.2
_SPLIT_SEED = 0


def digits(*, rest: str, data_dir: str | None, cache_bytes: int, **_: Any) -> tuple[Source, Source]:
    """Opens the set, prepared under `data_dir` if it was not yet. See `open_source`."""
    if rest:
        raise wrong(f"digits:{rest}", "is not allowed, give digits")
    return open_builder("digits", prepare(data_dir), data_dir, cache_bytes)


def load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {"train": (images, labels), "test": ...}: uint8 `[n, 8, 8]` of range 0..255, int64 `[n]`.

    A fifth of every class, drawn with a fixed seed, is the test split (1,438 and 359 rows).
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # 0..16 in the original
    rng = np.random.Generator(np.random.Philox(_SPLIT_SEED))
    test = np.zeros(len(labels), bool)
    for k in range(10):
        rows = np.flatnonzero(labels == k)
        test[rng.permutation(rows)[: round(TEST_FRACTION * len(rows))]] = True
    return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}


class Digits(tfds.core.GeneratorBasedBuilder):
    """The `digits` set: image uint8 `[8, 8, 1]` (PNG), label in 0..9; splits train and test."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

    @classmethod
    def get_metadata(cls) -> dataset_metadata.DatasetMetadata:
        # Given here because TFDS otherwise looks for README, TAGS and CITATIONS files beside the module.
        return dataset_metadata.DatasetMetadata(
            description="Handwritten digits of 8x8 pixels, as bundled with scikit-learn.",
            citation="Alpaydin, E. and Kaynak, C. (1998). Optical Recognition of Handwritten Digits. UCI.",
            tags=[],
        )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(shape=(8, 8, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(*arrays) for split, arrays in load().items()}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict]]:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            png = io.BytesIO()  # encoded here: given an array, TFDS would ask TensorFlow to encode it
            Image.fromarray(image).save(png, "PNG")
            png.seek(0)
            yield i, {"image": png, "label": int(label)}


def prepare(data_dir: str | None = None) -> Digits:
    """Returns the builder, prepared under `data_dir` (None: TFDS's own default) if it was not yet.

    Any number of processes may call this at once, and one that dies leaves no half-written set: each prepares
    in a private folder and renames it into place, so the folder `digits/1.0.0` is complete or absent. (TFDS
    renames too, but names its folder with the global `random`, which equally seeded processes share.)

    Raises:
      UserError: `data_dir` cannot be written, or holds a broken copy of the set.
    """
    with whole("digits", data_dir or "TFDS's default folder"):
        builder = Digits(data_dir=data_dir, file_format="array_record")
    target = pathlib.Path(builder.data_dir).expanduser()
    if not _complete(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="incomplete.") as private:
                made = _build(private)
                try:
                    os.rename(made, target)
                except OSError:
                    if not _complete(target):  # else another process was first, with the same bytes
                        raise
        except OSError as error:
            hint = f"; remove {target}" if target.exists() else ""
            raise UserError(
                f"data.data_dir: digits cannot be prepared in {data_dir!r} ({error.strerror}){hint}"
            ) from None
        builder = Digits(data_dir=data_dir, file_format="array_record")
    return builder


def _build(folder: str) -> str:
    """Prepares the set below `folder`, silently (it takes a second), and returns where."""
    builder = Digits(data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()
    return str(builder.data_dir)


def _complete(folder: pathlib.Path) -> bool:
    return (folder / "dataset_info.json").is_file()  # what TFDS writes last
