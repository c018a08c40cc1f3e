"""Augmentation on the device, one key a row.

Images stay uint8 until here, in the loader and in the rehearsal buffer alike, so a replayed row is augmented afresh.
A row's result depends on the key and on the row's position in the global batch, not on how many devices share
the batch. The recipe (zero-padded random crop, horizontal flip) is that of He et al., CVPR 2016, section 4.2.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.errors import UserError

Normalize = Callable[[jax.Array], jax.Array]
Augment = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _flip(key: jax.Array, image_HxWxC: jax.Array) -> jax.Array:
    """Mirrors left and right, with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image_HxWxC[:, ::-1], image_HxWxC)


def _crop(key: jax.Array, image_HxWxC: jax.Array) -> jax.Array:
    """Pads by an eighth of each side (4 pixels of 32) with zeros and cuts a window of the old size anywhere."""
    h, w, _ = image_HxWxC.shape
    pads = jnp.array([_padding(h), _padding(w)])
    padded = jnp.pad(image_HxWxC, ((_padding(h),) * 2, (_padding(w),) * 2, (0, 0)))
    y, x = jax.random.randint(key, (2,), 0, 2 * pads + 1)
    return jax.lax.dynamic_slice(padded, (y, x, jnp.zeros_like(y)), image_HxWxC.shape)


def _padding(side: int) -> int:
    return max(1, side // 8)


_BY_NAME = {"crop": _crop, "flip": _flip}


def make_normalize(
    image_shape: Sequence[int], *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Normalize:
    """Returns `normalize(images: uint8 [n, H, W, C]) -> float32 [n, H, W, C]`, what evaluation uses.

    x/255, then (x - mean) / std where given: C numbers each, in units of x/255.

    Raises:
      UserError: wrong shape, wrong number of channels, or a std that is not positive.
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise UserError(f"image_shape {tuple(image_shape)}: allowed are three positive integers (H, W, C)")
    channels = image_shape[-1]
    center, scale = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    if mean is not None:
        center = _per_channel("mean", mean, channels)
    if std is not None:
        scale = _per_channel("std", std, channels)
        if not (scale > 0).all():
            raise UserError(f"std {tuple(std)}: allowed are numbers above 0")

    def normalize(images_NxHxWxC: jax.Array) -> jax.Array:
        x = images_NxHxWxC.astype(jnp.float32) / 255
        return x if mean is None and std is None else (x - center) / scale

    return normalize


def _per_channel(field: str, values: Sequence[float], channels: int) -> np.ndarray:
    array = np.asarray(values, np.float32)
    if array.shape != (channels,) or not np.isfinite(array).all():
        raise UserError(f"{field} {values!r}: allowed are {channels} finite numbers, one a channel")
    return array


def make_augment(
    names: Sequence[str],
    image_shape: Sequence[int],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Augment:
    """Returns `augment(key, rows: int32 [n], images: uint8 [n, H, W, C]) -> float32 [n, H, W, C]`.

    `rows` are positions in the global batch: row i is augmented with `fold_in(key, rows[i])`. The augmentations
    ("crop", "flip") apply in the order of `names`; without any, the key is not used. Normalisation, as in
    `make_normalize`, comes last.

    Raises:
      UserError: an unknown or repeated name, or as `make_normalize`.
    """
    if isinstance(names, str):
        raise UserError(f"augment {names!r}: allowed is a list out of {', '.join(_BY_NAME)}")
    for i, name in enumerate(names):
        if name not in _BY_NAME or name in names[:i]:
            problem = "is repeated" if name in _BY_NAME else "is unknown"
            raise UserError(
                f"augment {list(names)!r}: {name!r} {problem}; allowed are {', '.join(_BY_NAME)}, each once"
            )
    steps = [_BY_NAME[name] for name in names]
    normalize = make_normalize(image_shape, mean=mean, std=std)

    def augment_row(key: jax.Array, row: jax.Array, image_HxWxC: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(key, row), len(steps))
        for step, step_key in zip(steps, keys, strict=True):
            image_HxWxC = step(step_key, image_HxWxC)
        return image_HxWxC

    def augment(key: jax.Array, rows_N: jax.Array, images_NxHxWxC: jax.Array) -> jax.Array:
        if steps:
            images_NxHxWxC = jax.vmap(augment_row, in_axes=(None, 0, 0))(key, rows_N, images_NxHxWxC)
        return normalize(images_NxHxWxC)

    return augment
