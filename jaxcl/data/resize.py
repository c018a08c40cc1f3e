"""Bilinear resizing of a part of an image, with antialiasing where it shrinks: Pillow's filter.

Of cutting an ImageNet file to 224 pixels a side, resizing takes Pillow nearly as long as decoding does. cykooz_resizer applies
the same filter to Pillow's own memory with the vector instructions of the CPU, and without the GIL. Where it is not installed,
and for images with an alpha channel, Pillow resizes. The two differ by rounding: no value by more than `TOLERANCE`.
"""

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

TOLERANCE = 1  # of 255

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels
Resize = Callable[["Image.Image", tuple[int, int], Box], "Image.Image"]
_log = logging.getLogger("jaxcl")


def resize(image: "Image.Image", size: tuple[int, int], box: Box) -> "Image.Image":
    """The part `box` of an image of mode L, RGB or RGBA, scaled to `size` (width, height)."""
    fast = None if image.mode == "RGBA" else vectorised()
    return (fast or plain)(image, size, box)


def plain(image: "Image.Image", size: tuple[int, int], box: Box) -> "Image.Image":
    """`resize` by Pillow: the standard."""
    from PIL import Image

    return image.resize(size, Image.Resampling.BILINEAR, box)


@functools.cache
def vectorised() -> Resize | None:
    """`resize` by cykooz_resizer, for modes L and RGB; None, which is said once, where it is not installed."""
    try:
        import cykooz_resizer as fast
    except ImportError:
        _log.warning("data: cykooz-resizer is not installed, Pillow resizes images: cutting them takes longer")
        return None
    from PIL import Image

    filter = fast.ResizeAlg.convolution(fast.FilterType.bilinear)

    def run(image: Image.Image, size: tuple[int, int], box: Box) -> Image.Image:
        left, upper, right, lower = box
        image.load()
        cut = Image.new(image.mode, size, None)
        options = fast.ResizeOptions(filter, crop_box=fast.CropBox(left, upper, right - left, lower - upper))
        fast.Resizer().resize_pil(image, cut, options)  # one a call: a resizer is not for several threads
        return cut

    return run
