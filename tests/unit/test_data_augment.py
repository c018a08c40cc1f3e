"""Augmentation: every output is one of the allowed crops and mirrors; a row's result is its own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.data import AUGMENTATIONS, make_augment, make_normalize
from jaxcl.errors import UserError

SHAPE = (16, 8, 3)  # padded by 2 and 1
IMAGES = np.random.default_rng(0).integers(1, 256, (64, *SHAPE), np.uint8)
ROWS = np.arange(64, dtype=np.int32)
KEY = jax.random.key(0)


def _variants(image, crop, flip):
    """All results that the named augmentations may give for one image, crop before flip: NumPy's own slicing."""
    padded = np.pad(image, ((2, 2), (1, 1), (0, 0)))
    windows = [padded[y : y + 16, x : x + 8] for y in range(5) for x in range(3)] if crop else [image]
    return windows + [w[:, ::-1] for w in windows] if flip else windows


@pytest.mark.parametrize(("crop", "flip"), [(True, False), (False, True), (True, True)])
def test_results_are_the_allowed_ones_and_all_occur(crop, flip):
    augment = jax.jit(make_augment([*["crop"] * crop, *["flip"] * flip], SHAPE))
    images = np.broadcast_to(IMAGES[:1], (1000, *SHAPE))
    out = np.rint(np.asarray(augment(KEY, jnp.arange(1000), images)) * 255).astype(np.uint8)
    seen = {x.tobytes() for x in out}
    # False alarm: 30 variants, 1,000 rows, a variant missed with 30 * (29/30)^1000 < 1e-13; the seed is fixed anyway.
    assert seen == {np.ascontiguousarray(v).tobytes() for v in _variants(IMAGES[0], crop, flip)}


def test_a_row_depends_on_key_and_position_not_on_its_batch():
    augment = jax.jit(make_augment(["crop", "flip"], SHAPE))
    whole = np.asarray(augment(KEY, ROWS, IMAGES))
    for n in (1, 2, 8):  # as n devices would
        parts = [augment(KEY, r, x) for r, x in zip(np.split(ROWS, n), np.split(IMAGES, n), strict=True)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    order = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(augment(KEY, ROWS[order], IMAGES[order]), whole[order])
    assert (np.asarray(augment(jax.random.key(1), ROWS, IMAGES)) != whole).any()
    assert (np.asarray(augment(KEY, ROWS + 1, IMAGES)) != whole).any()


def test_rows_differ_from_each_other():
    same = np.broadcast_to(IMAGES[:1], IMAGES.shape)
    out = np.asarray(make_augment(["crop"], SHAPE)(KEY, ROWS, same))
    assert len({x.tobytes() for x in out}) > 10  # of 15 windows


def test_normalisation_is_last_and_equals_that_of_evaluation():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    expected = (IMAGES.astype(np.float64) / 255 - mean) / std
    normalize, augment = (
        make_normalize(SHAPE, mean=mean, std=std),
        make_augment([], SHAPE, mean=mean, std=std),
    )
    assert normalize(IMAGES).dtype == jnp.float32
    np.testing.assert_allclose(normalize(IMAGES), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(augment(KEY, ROWS, IMAGES), normalize(IMAGES))
    # The zeros of a crop's border are black pixels, normalised like any other.
    cropped = np.asarray(make_augment(["crop"], SHAPE, mean=mean, std=std)(KEY, ROWS, IMAGES))
    np.testing.assert_allclose(cropped.min((0, 1, 2)), -np.array(mean) / std, rtol=1e-5)


def test_only_mean_or_only_std_and_neither():
    np.testing.assert_allclose(make_normalize(SHAPE)(IMAGES), IMAGES / 255, rtol=1e-6)
    np.testing.assert_allclose(make_normalize(SHAPE, mean=(1, 1, 1))(IMAGES), IMAGES / 255 - 1, atol=1e-6)
    np.testing.assert_allclose(make_normalize(SHAPE, std=(2, 2, 2))(IMAGES), IMAGES / 510, rtol=1e-6)


def test_small_images_are_padded_by_one():
    image = np.full((1, 4, 4, 1), 255, np.uint8)
    out = np.asarray(make_augment(["crop"], (4, 4, 1))(KEY, np.arange(500), np.repeat(image, 500, 0)))
    assert {int(x.sum()) for x in out} == {16, 12, 9}


def test_a_new_key_does_not_retrace():
    made = make_augment(["crop", "flip"], SHAPE)
    augment = jax.jit(chex.assert_max_traces(lambda *x: made(*x), n=1))
    for seed in range(3):
        augment(jax.random.key(seed), ROWS, IMAGES)


@pytest.mark.parametrize(
    ("names", "shape", "options", "message"),
    [
        (["flop"], SHAPE, {}, "data.augment: 'flop' is unknown, did you mean flip?"),
        (["flip", "flip"], SHAPE, {}, "data.augment: ['flip', 'flip'] is not allowed, give flip once"),
        ("flip", SHAPE, {}, "data.augment: 'flip' is not allowed, give a list out of crop, flip"),
        ([], (8, 8), {}, "image_shape: (8, 8) is not allowed, give three positive integers (H, W, C)"),
        ([], (8, 0, 1), {}, "image_shape: (8, 0, 1) is not allowed, give three positive integers (H, W, C)"),
        ([], SHAPE, {"mean": (0.5,)}, "data.mean: (0.5,) is not allowed, give 3 finite numbers, one a channel"),
        ([], SHAPE, {"mean": "abc"}, "data.mean: 'abc' is not allowed, give 3 finite numbers, one a channel"),
        (
            [],
            SHAPE,
            {"mean": (1, None, 1)},
            "data.mean: (1, None, 1) is not allowed, give 3 finite numbers, one a channel",
        ),
        (
            [],
            SHAPE,
            {"std": (1, 1, float("nan"))},
            "data.std: (1, 1, nan) is not allowed, give 3 finite numbers, one a channel",
        ),
        ([], SHAPE, {"std": (1, 0, 1)}, "data.std: (1, 0, 1) is not allowed, give numbers above 0"),
    ],
)
def test_mistakes(names, shape, options, message):
    with pytest.raises(UserError) as info:
        make_augment(names, shape, **options)
    assert str(info.value) == message


def invert(key, image):
    """An augmentation from outside."""
    return 255 - image


def test_an_augmentation_from_outside_takes_its_place_in_the_list():
    own = make_augment([f"{__name__}:invert", "flip"], SHAPE)(KEY, ROWS, IMAGES)
    keys = [jax.random.split(jax.random.fold_in(KEY, row), 2)[1] for row in ROWS]
    flipped = np.stack([AUGMENTATIONS["flip"](key, image) for key, image in zip(keys, IMAGES, strict=True)])
    np.testing.assert_allclose(own, make_normalize(SHAPE)(255 - flipped), rtol=1e-6)
