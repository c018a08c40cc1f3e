"""Cutting images of any size to one size as they are decoded, on the CPU: what ImageNet needs.

In training a random window of 8 % to 100 % of the area and of a shape from 3:4 to 4:3, scaled to the size asked for
(Szegedy et al. 2015, section 6; the constants of the usual implementations). In evaluation the middle square whose side
is 224/256 of the shorter side (Krizhevsky et al. 2012). Bilinear, with antialiasing where it shrinks, see `resize`.

A window is chosen in the pixels of the file, whatever decodes it. In training, a JPEG file whose window is at least 2, 4 or 8
times as large as what it is scaled to is decoded at that fraction of its size: libjpeg then computes the mean of every so many
pixels (about) from the coefficients. In evaluation a file is decoded whole, so its pixels are those of Pillow but for
`resize.TOLERANCE`.
"""

import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from jaxcl.data.resize import Box, resize

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by number of channels
_AREA, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
_MIDDLE = 224 / 256


def middle(encoded: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """The middle of a PNG or JPEG file as uint8 `[H, W, C]`."""
    return _cut(encoded, shape, middle_box, reduced=False)


def random(encoded: bytes, shape: tuple[int, int, int], seed: tuple[int, ...]) -> np.ndarray:
    """A window of a PNG or JPEG file, which `seed` chooses, as uint8 `[H, W, C]`."""
    # The length comes first because a SeedSequence takes (1,) and (1, 0) for the same entropy.
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((len(seed), *seed))))
    return _cut(encoded, shape, lambda width, height: random_box(width, height, rng), reduced=True)


def middle_box(width: int, height: int) -> Box:
    """The square in the middle whose side is 224/256 of the shorter side."""
    side = _MIDDLE * min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """A window whose area and shape are drawn, within the image; the whole image if ten draws do not fit."""
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*_AREA)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, upper, left + w, upper + h
    return 0, 0, width, height


def _cut(encoded: bytes, shape: tuple[int, int, int], box_of: Callable[[int, int], Box], reduced: bool) -> np.ndarray:
    from PIL import Image

    height, width, channels = shape
    with Image.open(io.BytesIO(encoded)) as file:
        box = box_of(*file.size)
        if reduced:
            box = _reduce(file, box, width, height)
        image = file if file.mode == MODES[channels] else file.convert(MODES[channels])
        return np.asarray(resize(image, (width, height), box)).reshape(shape)


def _reduce(image: "Image.Image", box: Box, width: int, height: int) -> Box:
    """Has a JPEG file decoded at 1/2, 1/4 or 1/8 of its size where `box` is still as large as width x height then.

    Returns:
      The same box, in the pixels of what will be decoded.
    """
    left, upper, right, lower = box
    most = min((right - left) / width, (lower - upper) / height)
    scale = max(s for s in (1, 2, 4, 8) if s <= max(most, 1))
    if scale == 1 or image.draft(None, (image.width // scale, image.height // scale)) is None:  # None: no JPEG
        return box
    return left / scale, upper / scale, right / scale, lower / scale
