"""Rows whose images are PNG or JPEG files, whoever stores them: decoded all at once, or batch by batch."""

import io
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcl.data import window
from jaxcl.data.resize import vectorised
from jaxcl.data.source import Source, hold_out
from jaxcl.data.sources.base import brief, read_each, wrong
from jaxcl.errors import UserError

TEST_SHARE, SPLIT_SEED = 0.2, 0  # of a set that has no test rows
GREY, COLOUR = ("1", "L", "LA"), ("P", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes; others have more than 8 bits
_CHUNK = 256  # rows a thread decodes at a time


@dataclass(frozen=True, eq=False)
class Encoded:
    """The rows of a split.

    Attributes:
      rows: dicts by random access, `rows.__getitems__(numbers)`; the image is a file's bytes.
      image, label: their keys.
      shape: (H, W, C) of an image as it is read.
      called: what a row is called, for errors.
    """

    rows: Any
    image: str
    label: str
    shape: tuple[int, int, int]
    called: Callable[[int], str]

    def source(
        self, labels: np.ndarray, class_names: tuple[str, ...], images: np.ndarray | None, image_size: int | None
    ) -> Source:
        """The source of labels int32 `[n]` and of `images` uint8 `[n, H, W, C]` that are decoded, or of those that are yet to
        be: whole, or with an `image_size` cut, in training at random."""
        if images is not None:
            return Source(labels, self.shape, class_names, images.__getitem__, in_memory=True)
        if image_size is None:
            return Source(labels, self.shape, class_names, self.read)
        vectorised()  # says now what it has to say
        return Source(labels, self.shape, class_names, self.read_middle, self.read_random)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Whole images, uint8 `[m, H, W, C]`."""
        return self._stack(indices, lambda file, row: decode(file, self.shape))

    def read_middle(self, indices: np.ndarray) -> np.ndarray:
        """The middle square of each image, uint8 `[m, H, W, C]`."""
        return self._stack(indices, lambda file, row: window.middle(file, self.shape))

    def read_random(self, indices: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        """A window of each image, uint8 `[m, H, W, C]`."""
        return self._stack(indices, lambda file, row: window.random(file, self.shape, (*seed, row)))

    def scan(self, images: np.ndarray | None = None) -> np.ndarray:
        """All labels, int32 `[n]`; all images are written to `images`, uint8 `[n, H, W, C]`, and without it none is decoded.

        Raises:
          DataError: an image cannot be decoded; names it.
        """
        labels = np.empty(len(self.rows), np.int32)

        def load(start: int) -> None:
            rows = range(start, min(start + _CHUNK, len(labels)))
            if images is not None:
                images[rows.start : rows.stop] = self.read(np.asarray(rows))
            labels[rows.start : rows.stop] = [row[self.label] for row in self.rows.__getitems__(list(rows))]

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(load, range(0, len(labels), _CHUNK)))  # waits, and raises the first error
        return labels

    def _stack(self, indices: np.ndarray, decode_row: Callable[[bytes, int], np.ndarray]) -> np.ndarray:
        """The images that `decode_row` makes of the files and numbers of these rows; `DataError` where it cannot."""
        rows = np.asarray(indices).tolist()
        images = read_each(self.called, self.rows, rows, lambda found, row: decode_row(found[self.image], row))
        return np.stack(images) if images else np.empty((0, *self.shape), np.uint8)


def decode(encoded: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """A PNG or JPEG file to uint8 `[H, W, C]`."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert(window.MODES[shape[-1]])).reshape(shape)


def apart(name: str, sources: Sequence[Source]) -> tuple[Source, Source]:
    """(train, test) of two sources, or of one, a fifth of every class of which is then for testing.

    Raises:
      UserError: no class of the one has two rows.
    """
    if len(sources) == 2:
        return sources[0], sources[1]
    try:
        return hold_out(sources[0], TEST_SHARE, SPLIT_SEED)
    except UserError:
        raise wrong(name, "has one image a class, give two or more, or train and test") from None


def shape_of(
    name: str, count: int, file_of: Callable[[int], pathlib.Path | bytes], image_size: int | None
) -> tuple[int, int, int]:
    """That of an image as it is read, from the headers of the files of all rows; grey if all are.

    Raises:
      UserError: a file is no image, or one of more than 8 bits a channel; sizes differ and there is no `image_size`.
    """

    def header(row: int) -> tuple[tuple[int, int], str]:
        from PIL import Image

        file = file_of(row)
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                size, mode = image.size, image.mode
        except Exception as error:
            raise wrong(
                name, f"has {_called(file, row)}, which cannot be read, is it damaged? ({brief(error)})"
            ) from None
        if mode not in (*GREY, *COLOUR):
            raise wrong(name, f"has {_called(file, row)} of mode {mode}, give images of 8 bits a channel")
        return size, mode

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        headers = list(pool.map(header, range(count)))
    if not headers:
        raise wrong(name, "has no image, give PNG or JPEG files of each class")
    channels = 1 if all(mode in GREY for _, mode in headers) else 3
    if image_size is not None:
        return image_size, image_size, channels
    sizes = [size for size, _ in headers]
    ((width, height), most) = Counter(sizes).most_common(1)[0]
    if most < count:
        other = next(row for row, size in enumerate(sizes) if size != (width, height))
        odd = "{}x{} in {}".format(*sizes[other], _called(file_of(other), other))
        raise wrong(name, f"has images of several sizes ({width}x{height}, and {odd}), give data.image_size")
    return height, width, channels


def _called(file: pathlib.Path | bytes, row: int) -> str:
    return f"row {row}" if isinstance(file, bytes) else str(file)
