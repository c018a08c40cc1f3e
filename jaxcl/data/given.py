"""Data that a program hands to a run: arrays, a `Source`, or rows by random access as Grain and TFDS give them.

The config of such a run says what it was given, as data.source = "given:DIGEST": its folder belongs to these data, and other
ones are refused there as another config is.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcl.data.source import MOST_CLASSES, Source, array_source
from jaxcl.errors import DataError, UserError

KIND = "given"
FORMS = (
    "give (images, labels), a dict of images, labels and maybe class_names, a Source, or rows by random access, each a dict of "
    "image and label or a pair of them"
)
_KEYS = {"images": ("images", "image"), "labels": ("labels", "label")}
_MOST = 1 << 30  # bytes of the images that a digest is taken of
_CHUNK = 256  # rows


def given_sources(train: Any, test: Any) -> tuple[Source, Source]:
    """The sources of what was handed over; class names that come with one split are those of both, and without any they are
    numbers.

    Raises:
      UserError: it is nothing of this kind, the splits do not go together, or one of them was not given.
    """
    if train is None or test is None:
        raise UserError(f"{'train' if train is None else 'test'}: missing; {FORMS}")
    found = {"train": _source("train", train), "test": _source("test", test)}
    shapes = [source.image_shape for source in found.values()]
    if shapes[0] != shapes[1]:
        raise UserError(f"test: images of {shapes[1]} are not allowed, give {shapes[0]} as in train")
    named = {source.class_names for source in found.values() if source.class_names}
    if len(named) > 1:
        raise UserError("test: its class names are not allowed, give those of train")
    highest = max(int(source.labels.max(initial=0)) for source in found.values())
    names = named.pop() if named else tuple(map(str, range(min(highest + 1, MOST_CLASSES))))
    for split, source in found.items():
        low, high = int(source.labels.min(initial=0)), int(source.labels.max(initial=0))
        if low < 0 or high >= len(names):
            raise UserError(f"{split}: labels {low}..{high} are not allowed, give 0..{len(names) - 1}, one a class")
    one, other = (dataclasses.replace(source, class_names=names) for source in found.values())
    return one, other


def given_name(train: Source, test: Source) -> str:
    """What data.source says of them: the digest is one of shapes, labels, class names, targets and of all images; of more than
    1 GiB of a gibibyte of them, evenly spread."""
    digest = hashlib.sha256()
    for source in (train, test):
        digest.update(repr((source.image_shape, source.class_names, sorted(source.targets))).encode())
        digest.update(np.ascontiguousarray(source.labels, np.int32).tobytes())
        count = min(len(source), max(1, _MOST // int(np.prod(source.image_shape))))
        rows = np.linspace(0, len(source) - 1, count).astype(np.int64)
        for begin in range(0, count, _CHUNK):
            some = rows[begin : begin + _CHUNK]
            digest.update(np.ascontiguousarray(source.read(some)).tobytes())
            for name in sorted(source.targets):
                digest.update(np.ascontiguousarray(source.targets[name][some]).tobytes())
    return f"{KIND}:{digest.hexdigest()[:16]}"


def _source(split: str, found: Any) -> Source:
    """Its class names are () where none come with it."""
    if isinstance(found, Source):
        return found
    if isinstance(found, Mapping):
        images, labels = (next((found[key] for key in keys if key in found), None) for keys in _KEYS.values())
        return _of_arrays(split, images, labels, found.get("class_names"))
    if isinstance(found, tuple | list) and len(found) == 2 and all(hasattr(x, "shape") for x in found):
        return _of_arrays(split, found[0], found[1], None)
    if hasattr(found, "__len__") and hasattr(found, "__getitem__") and not hasattr(found, "shape") and len(found):
        return _of_rows(split, found)
    raise UserError(f"{split}: a {type(found).__name__} is not allowed, {FORMS}")


def _of_arrays(split: str, images: Any, labels: Any, class_names: Any) -> Source:
    if images is None or labels is None:
        raise UserError(f"{split}: images or labels are missing, {FORMS}")
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise UserError(
            f"{split}: images {images.dtype} {images.shape} are not allowed, give uint8 [n, H, W] or [n, H, W, C]"
        )
    images = images if images.ndim == 4 else images[..., None]
    return array_source(
        images, _labels(split, labels, len(images)), () if class_names is None else tuple(map(str, class_names))
    )


def _labels(split: str, labels: np.ndarray, rows: int) -> np.ndarray:
    """int32 `[n]`."""
    if labels.shape != (rows,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{split}: labels {labels.dtype} {labels.shape} are not allowed, give integers [{rows}]")
    return labels.astype(np.int32)


def _of_rows(split: str, rows: Any) -> Source:
    """Rows by random access, read by several threads at once; a pass over them gives the labels."""

    def pair(row: int) -> tuple[np.ndarray, Any]:
        try:
            item = rows[row]
            if isinstance(item, Mapping):
                image, label = (next(item[key] for key in reversed(keys) if key in item) for keys in _KEYS.values())
            else:
                image, label = item
            image = np.asarray(image)
        except Exception as error:
            raise DataError(f"data: row {row} of {split} cannot be read ({type(error).__name__}: {error})") from error
        return image if image.ndim == 3 else image[..., None], label

    def read(indices: np.ndarray) -> np.ndarray:
        images = [pair(int(row))[0] for row in indices]
        for row, image in zip(indices, images, strict=True):
            if image.dtype != np.uint8 or image.shape != shape:
                raise DataError(f"data: row {row} of {split} is {image.dtype} {image.shape}, the first uint8 {shape}")
        return np.stack(images) if images else np.empty((0, *shape), np.uint8)

    first = pair(0)[0]
    if first.dtype != np.uint8 or first.ndim != 3:
        raise UserError(f"{split}: images {first.dtype} {first.shape} are not allowed, give uint8 [H, W] or [H, W, C]")
    shape = (first.shape[0], first.shape[1], first.shape[2])
    labels = np.asarray([pair(row)[1] for row in range(len(rows))])
    features = getattr(getattr(rows, "dataset_info", None), "features", None) or {}  # of TFDS
    names = getattr(features["label"], "names", ()) if "label" in features else ()
    return Source(_labels(split, labels, len(rows)), shape, tuple(names), read)
