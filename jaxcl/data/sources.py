"""Where images come from: one small interface over TensorFlow Datasets, NumPy files and the built-in set.

A `Source` is random access by row: the loader asks for the rows of one batch, on any thread. Sets that fit in
memory are decoded once; larger ones are read from disk and decoded batch by batch, and their labels kept (`labels.py`).
"""

import difflib
import importlib.util
import io
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxcl.data import crop, label_cache
from jaxcl.errors import UserError

_ALLOWED = "digits, tfds:NAME, npz:FILE or ptychography:SIDE"
_CHUNK = 256  # rows a thread decodes at a time


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled images of one split, by row.

    Attributes:
      labels: int32 [n], each in 0..K-1.
      image_shape: (H, W, C).
      class_names: K names, by label.
      read: `read(indices: int [m]) -> uint8 [m, H, W, C]`, a fresh array, in the order asked for. Thread-safe.
      read_random: `read_random(indices, seed)`, the same of a window of each image that seed and index choose; for training
        on images of many sizes. None where an image is read whole.
      targets: what a model is to reconstruct from each image, float32 [n, ...] by name; {} where it classifies.
    """

    labels: np.ndarray
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    read: Callable[[np.ndarray], np.ndarray]
    read_random: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] | None = None
    targets: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)


def array_source(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Source:
    """A source over arrays in memory: images uint8 [n, H, W, C], labels int [n] in 0..K-1."""
    # Indexing with an array copies, so no caller can write into the set.
    return Source(labels.astype(np.int32), images.shape[1:], tuple(class_names), images.__getitem__)


def open_source(
    name: str, data_dir: str | None = None, cache_bytes: int = 1 << 30, image_size: int | None = None
) -> tuple[Source, Source]:
    """Opens a data set and returns its (train, test) sources.

    Args:
      name: `digits`, the built-in set; `ptychography:SIDE`, simulated patterns of SIDE pixels (see `ptychography.py`), to be
        reconstructed; `tfds:NAME`, any TFDS image classification set whose images have one size
        (its `validation` split stands in for a missing `test`); or `npz:FILE`, arrays x_train, y_train, x_test,
        y_test and optionally class_names, images uint8 [n, H, W] or [n, H, W, C].
      data_dir: the TFDS folder; None is TFDS's own default (`TFDS_DATA_DIR` or ~/tensorflow_datasets). A set that
        is not there yet is downloaded and prepared, which for most sets needs TensorFlow.
      cache_bytes: a TFDS set is decoded into memory if both splits together take at most this many bytes.
      image_size: of a TFDS set: cuts images of any size to squares of this side: the middle one, and in training a random
        window (see `Source.read_random`). Such a set is decoded batch by batch. None: images have one size already.

    Raises:
      UserError: the set is unknown, cannot be prepared, or is not one of labelled uint8 images of one size.
    """
    kind, _, rest = name.partition(":")
    data_dir = os.path.expanduser(data_dir) if data_dir else None
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size {image_size}: allowed are integers from 1")
    if kind == "tfds" and rest:
        return _open_builder(name, _tfds_builder(name, rest, data_dir), data_dir, cache_bytes, image_size)
    if image_size is not None:
        raise UserError(f"image_size {image_size}: dataset {name!r} has images of one size; allowed with tfds:NAME")
    if name == "digits":
        from jaxcl.data import digits

        return _open_builder(name, digits.prepare(data_dir), data_dir, cache_bytes)
    if kind == "npz" and rest:
        return _open_npz(name, rest)
    if kind == "ptychography" and rest.isdecimal():
        from jaxcl.data import ptychography

        return ptychography.simulate(int(rest))
    raise UserError(f"dataset {name!r}: unknown; allowed are {_ALLOWED}{_guess(_meant(name))}")


def _meant(name: str) -> str | None:
    """What a user who wrote the unknown dataset `name` probably meant."""
    kind, _, rest = name.partition(":")
    if rest:
        return next((f"{k}:{rest}" for k in difflib.get_close_matches(kind.lower(), ["tfds", "npz"], 1)), None)
    if name.endswith(".npz"):
        return f"npz:{name}"
    if difflib.get_close_matches(name.lower(), ["digits"]):
        return "digits"
    close = _close_tfds_name(name)
    return f"tfds:{close}" if close else None


def _guess(meant: str | None) -> str:
    return f" (did you mean {meant!r}?)" if meant else ""


def _brief(error: BaseException) -> str:
    """The first cause in one short line, without the page that may follow."""
    while error.__cause__:
        error = error.__cause__
    message = re.sub(r'^Failed to construct dataset .*?}": ', "", str(error))
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"[:160].rstrip(": ")


def _check_labels(field: str, labels: np.ndarray, num_classes: int) -> None:
    if not len(labels):
        raise UserError(f"{field}: the split is empty; at least one row is needed")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(f"{field}: labels range over {low}..{high}; allowed are 0..{num_classes - 1}")


# ---- npz ----


def _open_npz(name: str, path: str) -> tuple[Source, Source]:
    arrays = _load_npz(name, path)
    splits = []
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.dtype != np.uint8:
            raise UserError(f"dataset {name!r}: x_{split} is {x.dtype}; allowed is uint8")
        if x.ndim not in (3, 4) or 0 in x.shape[1:]:
            raise UserError(f"dataset {name!r}: x_{split} has shape {x.shape}; allowed are [n, H, W] and [n, H, W, C]")
        if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
            raise UserError(f"dataset {name!r}: y_{split} is {y.dtype} of shape {y.shape}; allowed are integers [n]")
        if len(x) != len(y):
            raise UserError(f"dataset {name!r}: x_{split} has {len(x)} rows and y_{split} {len(y)}; they must agree")
        splits.append((x if x.ndim == 4 else x[..., None], y))
    (x_train, y_train), (x_test, y_test) = splits
    if x_train.shape[1:] != x_test.shape[1:]:
        shapes = f"{x_train.shape[1:]} in x_train and {x_test.shape[1:]} in x_test"
        raise UserError(f"dataset {name!r}: images are {shapes}; they must agree")
    if "class_names" in arrays:
        class_names = [str(s) for s in np.atleast_1d(arrays["class_names"])]
    else:
        highest = max([0, *(int(y.max()) for _, y in splits if len(y))])
        # No set has more classes than rows: labels that say so (years, say) are outside.
        class_names = [str(k) for k in range(min(highest + 1, max(1, len(y_train) + len(y_test))))]
    for split, (_, y) in zip(("train", "test"), splits, strict=True):
        _check_labels(f"dataset {name!r}: y_{split}", y, len(class_names))
    return array_source(x_train, y_train, class_names), array_source(x_test, y_test, class_names)


def _load_npz(name: str, path: str) -> dict[str, np.ndarray]:
    needed = ("x_train", "y_train", "x_test", "y_test")
    try:
        with open(path, "rb") as file:  # np.load leaves a broken archive open
            archive = np.load(file)  # refuses pickled objects
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            missing = [key for key in needed if key not in archive]
            if missing:
                raise UserError(f"dataset {name!r}: lacks {', '.join(missing)}; needed are {', '.join(needed)}")
            return {key: archive[key] for key in (*needed, "class_names") if key in archive}
    except UserError:  # which is a ValueError
        raise
    except FileNotFoundError:
        raise UserError(f"dataset {name!r}: there is no file {os.path.abspath(path)}") from None
    except OSError as error:
        raise UserError(f"dataset {name!r}: cannot be read ({error.strerror or _brief(error)})") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"dataset {name!r}: not an npz file of plain arrays ({_brief(error)})") from None


# ---- TensorFlow Datasets ----


def _close_tfds_name(name: str, data_dir: str | None = None) -> str | None:
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if data_dir and os.path.isdir(data_dir):  # sets prepared by builders that this process does not know
        known += os.listdir(data_dir)
    return next(iter(difflib.get_close_matches(name.lower(), known, 1, 0.7)), None)


def _tfds_builder(name: str, tfds_name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(tfds_name, data_dir=data_dir)  # finds sets without code, from their folder, too
    except tfds.core.DatasetNotFoundError:
        where = data_dir or tfds.core.constants.DATA_DIR
        guess = _close_tfds_name(tfds_name, data_dir)
        raise UserError(
            f"dataset {name!r}: neither a TFDS set nor prepared in {where}{_guess(guess and f'tfds:{guess}')}"
        ) from None
    except Exception as error:  # whatever a builder's code raises about its name, config or version
        raise UserError(f"dataset {name!r}: cannot be opened ({_brief(error)})") from None


def open_examples(name: str, data_dir: str | None, splits: Sequence[str]) -> list[Any]:
    """Splits of a TFDS set with an "image" and whatever else, each example a dict by random access, its image a file's bytes.

    Raises:
      UserError: the set is unknown or cannot be prepared, or has no such split.
    """
    from tensorflow_datasets import decode

    builder = _tfds_builder(name, name.partition(":")[2], data_dir)
    if not _prepared(builder):
        builder = _download(name, builder, data_dir)
    missing = [split for split in splits if split not in builder.info.splits]
    if missing:
        found = ", ".join(builder.info.splits)
        raise UserError(f"dataset {name!r}: has splits {found}; needed are {', '.join(splits)}")
    return [builder.as_data_source(split, decoders={"image": decode.SkipDecoding()}) for split in splits]


def _open_builder(
    name: str, builder: Any, data_dir: str | None, cache_bytes: int, image_size: int | None = None
) -> tuple[Source, Source]:
    image_key, label_key, shape = _features(name, builder.info, image_size)  # before a download of hours
    if not _prepared(builder):
        builder = _download(name, builder, data_dir)
    splits = builder.info.splits
    test = "test" if "test" in splits else "validation"
    missing = [split for split in ("train", test) if split not in splits]
    if missing:
        raise UserError(f"dataset {name!r}: has splits {', '.join(splits)}; needed are train and test or validation")

    class_names = tuple(builder.info.features[label_key].names)
    rows = sum(splits[s].num_examples for s in ("train", test))
    cached = image_size is None and rows * math.prod(shape) <= cache_bytes

    def open_split(split: str) -> Source:
        from tensorflow_datasets import decode

        # Images are left encoded: reading labels then decodes none, and `_decode` also copes with the odd
        # grey or CMYK file of a colour set. With `decoders`, TFDS still decodes every other feature.
        try:
            examples = builder.as_data_source(split, decoders={image_key: decode.SkipDecoding()})
        except NotImplementedError:
            raise UserError(
                f"dataset {name!r}: prepared as {builder.info.file_format.value} in {builder.data_dir}, which has no"
                " random access; allowed is array_record"
            ) from None

        def decoded(indices: np.ndarray, decode_row: Callable[[bytes, int], np.ndarray]) -> np.ndarray:
            images = np.empty((len(indices), *shape), np.uint8)
            rows = np.asarray(indices).tolist()
            for image, row, example in zip(images, rows, examples.__getitems__(rows), strict=True):
                image[:] = decode_row(example[image_key], row)
            return images

        def read(indices: np.ndarray) -> np.ndarray:
            whole = _decode if image_size is None else crop.middle
            return decoded(indices, lambda file, row: whole(file, shape))

        def read_random(indices: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
            return decoded(indices, lambda file, row: crop.random(file, shape, (*seed, row)))

        n = len(examples)
        images = np.empty((n, *shape), np.uint8) if cached else None

        def read_labels() -> np.ndarray:
            found = np.empty(n, np.int32)

            def load(start: int) -> None:
                rows = range(start, min(start + _CHUNK, n))
                for i, example in zip(rows, examples.__getitems__(list(rows)), strict=True):
                    found[i] = example[label_key]
                    if images is not None:
                        images[i] = _decode(example[image_key], shape)

            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                list(pool.map(load, range(0, n, _CHUNK)))  # waits, and raises the first error
            return found

        labels = read_labels() if cached else label_cache.cached(builder, split, n, read_labels)
        _check_labels(f"dataset {name!r}: split {split}", labels, len(class_names))
        return Source(
            labels,
            shape,
            class_names,
            read if images is None else images.__getitem__,
            None if image_size is None else read_random,
        )

    return open_split("train"), open_split(test)


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
        raise UserError(f"dataset {name!r}: has features {', '.join(features)}; needed are an Image and a ClassLabel")
    if image.np_dtype != np.uint8 or image.shape[-1] not in crop.MODES:
        found = f"{image.np_dtype.__name__} of shape {image.shape}"
        raise UserError(f"dataset {name!r}: images are {found}; allowed are uint8 of 1, 3 or 4 channels")
    if image_size is not None:
        return keys[0], keys[1], (image_size, image_size, image.shape[-1])
    if None in image.shape:
        raise UserError(
            f"dataset {name!r}: images have shape {image.shape}; allowed are sets whose images have one size, or give"
            " data.image_size"
        )
    return keys[0], keys[1], image.shape


def _prepared(builder: Any) -> bool:
    return (builder.data_path / "dataset_info.json").exists()  # as builder.is_prepared(), which logs a warning if not


def _download(name: str, builder: Any, data_dir: str | None) -> Any:
    """Downloads and prepares the set and returns a builder that reads it."""
    import tensorflow_datasets as tfds

    where = f"dataset {name!r}: not prepared in {builder.data_dir}"
    if importlib.util.find_spec("tensorflow") is None:
        # Most builders encode images by TensorFlow, after the download: better to fail in the first second.
        raise UserError(f"{where}; TFDS needs TensorFlow and a network to prepare it, or point data_dir at a copy")
    try:
        config = tfds.download.DownloadConfig(try_download_gcs=False)  # the bucket holds no array_record
        builder.download_and_prepare(file_format="array_record", download_config=config)
    except Exception as error:  # network, checksum, disk, the builder's own code
        if not _prepared(builder):  # else another process was first to rename its copy into place
            raise UserError(f"{where} and cannot be downloaded ({_brief(error)})") from None
    return tfds.builder(name.partition(":")[2], data_dir=data_dir)


def _decode(encoded: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """A PNG or JPEG file to uint8 [H, W, C]."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert(crop.MODES[shape[-1]])).reshape(shape)
