"""`tfds:NAME`: an image classification set of TensorFlow Datasets, prepared as array_record.

Its `validation` split stands in for a missing `test`. A set that fits in memory is decoded once. A larger one, or one whose
images are cut to one size, is read and decoded batch by batch, and its labels are kept (see `label_cache`). TFDS is imported
when a set is opened: that takes seconds.
"""

import difflib
import importlib.util
import io
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcl.data import label_cache, window
from jaxcl.data.resize import vectorised
from jaxcl.data.source import Source
from jaxcl.data.sources.base import brief, check_labels, read_each, whole, wrong

_CHUNK = 256  # rows a thread decodes at a time


def tfds(
    *, rest: str, data_dir: str | None, image_size: int | None, cache_bytes: int, **_: Any
) -> tuple[Source, Source]:
    """Opens the set `rest`, "NAME", "NAME/CONFIG" or "NAME:VERSION". See `open_source`."""
    if not rest:
        raise wrong("tfds", "is not allowed, give tfds:NAME")
    return open_builder(f"tfds:{rest}", _builder(rest, data_dir), data_dir, cache_bytes, image_size)


def open_builder(
    name: str, builder: Any, data_dir: str | None, cache_bytes: int, image_size: int | None = None
) -> tuple[Source, Source]:
    """The (train, test) sources of a builder, which is prepared if it is not yet."""
    image_key, label_key, shape = _features(name, builder.info, image_size)  # before a download of hours
    builder = _prepare(name, builder, data_dir)
    found = builder.info.splits
    splits = ("train", "test" if "test" in found else "validation")
    if not set(splits) <= set(found):
        raise wrong(name, f"has splits {', '.join(found)}, give a set with train and test or validation")
    class_names = tuple(builder.info.features[label_key].names)
    rows = sum(found[split].num_examples for split in splits)
    if image_size is not None:
        vectorised()  # says now what it has to say
    cached = image_size is None and rows * math.prod(shape) <= cache_bytes
    sources = []
    with whole(name, builder.data_dir):
        for split in splits:
            where = f"{name}, split {split} in {builder.data_dir},"
            examples = _Examples(where, _encoded(name, builder, split, image_key), image_key, label_key, shape)
            if cached:
                images = np.empty((len(examples.rows), *shape), np.uint8)
                labels = examples.scan(images)
            else:
                labels = label_cache.cached(builder, split, len(examples.rows), examples.scan)
            check_labels(name, f"split {split}", labels, len(class_names))
            read = images.__getitem__ if cached else examples.read if image_size is None else examples.read_middle
            random = None if image_size is None else examples.read_random
            sources.append(Source(labels, shape, class_names, read, random, in_memory=cached))
    train, test = sources
    return train, test


def open_examples(name: str, data_dir: str | None, splits: Sequence[str]) -> list[Any]:
    """Splits of a TFDS set with an "image" and whatever else, each example a dict by random access, its image a file's bytes.

    Raises:
      UserError: the set is unknown or cannot be prepared, or has no such split.
    """
    builder = _prepare(name, _builder(name.partition(":")[2], data_dir), data_dir)
    if not set(splits) <= set(builder.info.splits):
        raise wrong(name, f"has splits {', '.join(builder.info.splits)}, give a set with {', '.join(splits)}")
    with whole(name, builder.data_dir):
        return [_encoded(name, builder, split, "image") for split in splits]


@dataclass(frozen=True, eq=False)
class _Examples:
    """The rows of a split, as TFDS stores them.

    Attributes:
      name: of the set, its split and its folder.
      rows: dicts by random access; the image is a file's bytes.
      image, label: their keys.
      shape: (H, W, C) of an image as it is read.
    """

    name: str
    rows: Any
    image: str
    label: str
    shape: tuple[int, int, int]

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Whole images, uint8 `[m, H, W, C]`."""
        return self._stack(indices, lambda file, row: _decode(file, self.shape))

    def read_middle(self, indices: np.ndarray) -> np.ndarray:
        """The middle square of each image, uint8 `[m, H, W, C]`."""
        return self._stack(indices, lambda file, row: window.middle(file, self.shape))

    def read_random(self, indices: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        """A window of each image, uint8 `[m, H, W, C]`."""
        return self._stack(indices, lambda file, row: window.random(file, self.shape, (*seed, row)))

    def scan(self, images: np.ndarray | None = None) -> np.ndarray:
        """All labels, int32 `[n]`; all images are written to `images`, uint8 `[n, H, W, C]`, and without it none is decoded."""
        labels = np.empty(len(self.rows), np.int32)

        def load(start: int) -> None:
            rows = range(start, min(start + _CHUNK, len(labels)))
            for i, example in zip(rows, self.rows.__getitems__(list(rows)), strict=True):
                labels[i] = example[self.label]
                if images is not None:
                    images[i] = _decode(example[self.image], self.shape)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(load, range(0, len(labels), _CHUNK)))  # waits, and raises the first error
        return labels

    def _stack(self, indices: np.ndarray, decode: Callable[[bytes, int], np.ndarray]) -> np.ndarray:
        """The images that `decode` makes of the files and numbers of these rows; `DataError` where it cannot."""
        rows = np.asarray(indices).tolist()
        images = read_each(self.name, self.rows, rows, lambda example, row: decode(example[self.image], row))
        return np.stack(images) if images else np.empty((0, *self.shape), np.uint8)


def _encoded(name: str, builder: Any, split: str, image_key: str) -> Any:
    """The examples of a split by random access, their images left encoded: reading labels then decodes none, and `_decode`
    also copes with the odd grey or CMYK file of a colour set. With `decoders`, TFDS still decodes every other feature."""
    from tensorflow_datasets import decode

    try:
        return builder.as_data_source(split, decoders={image_key: decode.SkipDecoding()})
    except NotImplementedError:
        found = f"is prepared as {builder.info.file_format.value} in {builder.data_dir}, which has no random access"
        raise wrong(name, f"{found}, give array_record") from None


def _decode(encoded: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """A PNG or JPEG file to uint8 `[H, W, C]`."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert(window.MODES[shape[-1]])).reshape(shape)


def _features(name: str, info: Any, image_size: int | None) -> tuple[str, str, tuple[int, int, int]]:
    """The keys of image and label, and the shape of an image as it is read, of a set that this library can read."""
    from tensorflow_datasets import features as kinds

    features = dict(info.features.items()) if isinstance(info.features, kinds.FeaturesDict) else {}
    for keys in (info.supervised_keys, ("image", "label")):
        if not keys or len(keys) != 2 or not all(isinstance(key, str) for key in keys):
            continue
        image, label = (features.get(key) for key in keys)
        if isinstance(image, kinds.Image) and isinstance(label, kinds.ClassLabel) and label.num_classes:
            break
    else:
        raise wrong(name, f"has features {', '.join(features)}, give a set with an Image and a ClassLabel")
    if image.np_dtype != np.uint8 or image.shape[-1] not in window.MODES:
        raise wrong(name, f"has images {image.np_dtype.__name__} {image.shape}, give uint8 of 1, 3 or 4 channels")
    if image_size is not None:
        return keys[0], keys[1], (image_size, image_size, image.shape[-1])
    if None in image.shape:
        raise wrong(
            name, f"has images of shape {image.shape}, give data.image_size, or a set whose images have one size"
        )
    return keys[0], keys[1], image.shape


# ---- finding and preparing a set ----


def close_name(name: str, data_dir: str | None = None) -> str | None:
    """The known set whose name is like `name`."""
    import tensorflow_datasets

    known = tensorflow_datasets.list_builders(with_community_datasets=False)
    if data_dir and os.path.isdir(data_dir):  # sets prepared by builders that this process does not know
        known += os.listdir(data_dir)
    return next(iter(difflib.get_close_matches(name.lower(), known, 1, 0.7)), None)


def _builder(rest: str, data_dir: str | None) -> Any:
    import tensorflow_datasets

    try:
        return tensorflow_datasets.builder(rest, data_dir=data_dir)  # finds sets without code, from their folder, too
    except tensorflow_datasets.core.DatasetNotFoundError:
        close = close_name(rest, data_dir)
        hint = f"; did you mean tfds:{close}?" if close else ""
        where = data_dir or tensorflow_datasets.core.constants.DATA_DIR
        raise wrong(f"tfds:{rest}", f"is neither a TFDS set nor prepared in {where}{hint}") from None
    except Exception as error:  # whatever a builder's code raises about its name, config or version
        raise wrong(f"tfds:{rest}", f"cannot be opened ({brief(error)})") from None


def _prepared(builder: Any) -> bool:
    return (builder.data_path / "dataset_info.json").exists()  # as builder.is_prepared(), which logs a warning if not


def _prepare(name: str, builder: Any, data_dir: str | None) -> Any:
    """A builder that reads the set, which is downloaded and prepared if it is not yet."""
    import tensorflow_datasets

    if _prepared(builder):
        return builder
    where = f"is not prepared in {builder.data_dir}"
    if importlib.util.find_spec("tensorflow") is None:
        # Most builders encode images by TensorFlow, after the download: better to fail in the first second.
        raise wrong(name, f"{where}: TFDS needs TensorFlow and a network for that, or give data.data_dir of a copy")
    try:  # the bucket holds no array_record
        config = tensorflow_datasets.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(file_format="array_record", download_config=config)
    except Exception as error:  # network, checksum, disk, the builder's own code
        if not _prepared(builder):  # else another process was first to rename its copy into place
            raise wrong(name, f"{where} and cannot be downloaded ({brief(error)})") from None
    return tensorflow_datasets.builder(name.partition(":")[2], data_dir=data_dir)
