"""Augmentation on the device, and the normalisation behind it; one file an augmentation.

A file NAME.py has a function `NAME(key, image [H, W, C]) -> image [H, W, C]`, of the image's shape and dtype (uint8), which is
mapped over the rows of a batch.

Images stay uint8 until here, in the loader and in the rehearsal buffer alike, so a replayed row is augmented afresh.
A row's result depends on the key and on the row's position in the global batch, not on how many devices share the batch.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.check import Rule, check, refused
from jaxcl.registry import Registry

One = Callable[[jax.Array, jax.Array], jax.Array]  # (key, image [H, W, C]) -> image [H, W, C]
Normalize = Callable[[jax.Array], jax.Array]
Augment = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

AUGMENTATIONS: Registry[One] = Registry("data.augment", __name__)

_SHAPE = Rule(lambda x: len(x) == 3 and min(x) > 0, "three positive integers (H, W, C)")


def make_augment(
    names: Sequence[str],
    image_shape: Sequence[int],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    side: int | None = None,
) -> Augment:
    """Returns `augment(key, rows: int32 [n], images: uint8 [n, H, W, C]) -> float32 [n, H, W, C]`.

    `rows` are positions in the global batch: row i is augmented with `fold_in(key, rows[i])`. The augmentations, each one of
    `AUGMENTATIONS` or `module.path:name`, apply in the order of `names`; without any, the key is not used. Normalisation and
    scaling, as in `make_normalize`, come last.

    Raises:
      UserError: an unknown or repeated name, or as `make_normalize`.
    """
    if isinstance(names, str):
        raise refused("data.augment", names, f"a list out of {', '.join(AUGMENTATIONS)}")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise refused("data.augment", list(names), f"{name} once")
    steps = tuple(AUGMENTATIONS[name] for name in names)
    return partial(_augment, steps, make_normalize(image_shape, mean=mean, std=std, side=side))


def _augment(
    steps: tuple[One, ...], normalize: Normalize, key: jax.Array, rows: jax.Array, images: jax.Array
) -> jax.Array:
    if steps:
        images = jax.vmap(partial(_augment_row, steps), in_axes=(None, 0, 0))(key, rows, images)
    return normalize(images)


def _augment_row(steps: tuple[One, ...], key: jax.Array, row: jax.Array, image: jax.Array) -> jax.Array:
    keys = jax.random.split(jax.random.fold_in(key, row), len(steps))
    for step, step_key in zip(steps, keys, strict=True):
        image = step(step_key, image)
    return image


def make_normalize(
    image_shape: Sequence[int],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    side: int | None = None,
) -> Normalize:
    """Returns `normalize(images: uint8 [n, H, W, C]) -> float32 [n, H, W, C]`, what evaluation uses.

    x/255, then (x - mean) / std where given: C numbers each, in units of x/255; then, with `side`, scaled bilinearly to side x
    side pixels.

    Raises:
      UserError: wrong shape, wrong number of channels, or a std that is not positive.
    """
    check("image_shape", tuple(image_shape), _SHAPE)
    if mean is None and std is None:
        return partial(_normalize, None, side)
    channels = image_shape[-1]
    center = np.zeros(channels, np.float32) if mean is None else _per_channel("data.mean", mean, channels)
    scale = np.ones(channels, np.float32) if std is None else _per_channel("data.std", std, channels)
    if not (scale > 0).all():
        raise refused("data.std", std, "numbers above 0")
    return partial(_normalize, (center, scale), side)


def _normalize(by: tuple[np.ndarray, np.ndarray] | None, side: int | None, images: jax.Array) -> jax.Array:
    x = images.astype(jnp.float32) / 255
    x = x if by is None else (x - by[0]) / by[1]
    return x if side is None else jax.image.resize(x, (len(x), side, side, x.shape[-1]), "bilinear")


def scaled_shape(image_shape: Sequence[int], side: int | None) -> tuple[int, int, int]:
    """(H, W, C) of images as the model reads them."""
    h, w, channels = image_shape
    return (h, w, channels) if side is None else (side, side, channels)


def _per_channel(field: str, values: Sequence[float], channels: int) -> np.ndarray:
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        array = np.zeros(0, np.float32)
    if array.shape != (channels,) or not np.isfinite(array).all():
        raise refused(field, values, f"{channels} finite numbers, one a channel")
    return array
