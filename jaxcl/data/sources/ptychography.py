"""`ptychography:SIDE`: simulated diffraction patterns, and the amplitude and phase that they came from.

A coherent beam (the probe) illuminates a small part of a specimen; far behind it a detector counts photons. With t the
thickness of the specimen (0..1) in a window, P the probe and F the unitary Fourier transform, shifted to the middle:

    O = exp(-(absorption + i * shift) * t)              thin specimen of one material: amplitude |O|, phase arg O
    P ~ exp(-r^2 / (2 w^2)) * exp(i * pi * r^2 / side)  w = side / 3; |P|^2 sums to 1: a beam out of focus, so far that
                                                        its pattern is as wide as the window
    n ~ Poisson(photons * side^2 * |F(P * O)|^2)        Rodenburg & Faulkner 2004; Cherukara et al. 2020
    image = min(255, round(sqrt(n)))                    uint8: the root has the same noise, 1/2, at every intensity

The thickness is a smooth random field. Specimens are of different materials, the first ones transparent, whose image is in
the phase, the last ones dark: what was learned of one misleads about another. Train and test windows lie in different parts
of a specimen. Everything follows from the seed.
"""

from typing import Any

import numpy as np
import scipy.ndimage

from jaxcl.check import POSITIVE, check
from jaxcl.data.source import Source
from jaxcl.data.sources.base import wrong

SPECIMENS = 8
PHOTONS = 1000.0  # a pixel's, on the average, were the specimen not there
ABSORPTION = np.linspace(0.1, 1.2, SPECIMENS)  # of the amplitude, at thickness 1, in nepers
SHIFT = np.linspace(2.5, 0.3, SPECIMENS)  # of the phase, at thickness 1, in radians
_FIELD = 512  # pixels of a specimen's side
_GRAIN = 3.0  # pixels, the standard deviation of the blur that makes a specimen smooth
_TEST_FROM = 384  # test windows lie right of this column, train windows left of it


def ptychography(*, rest: str, **_: Any) -> tuple[Source, Source]:
    """Simulates patterns of `rest` pixels a side. See `open_source`."""
    if not rest.isdecimal() or len(rest) > 4:
        raise wrong(f"ptychography:{rest}".rstrip(":"), "is not allowed, give ptychography:SIDE")
    return simulate(int(rest))


def simulate(
    side: int = 64, *, train_rows: int = 512, test_rows: int = 128, photons: float = PHOTONS, seed: int = 0
) -> tuple[Source, Source]:
    """Simulates scans of `SPECIMENS` specimens, whose numbers are the labels.

    Args:
      side: pixels of a pattern, and of the window that it shows; 8..128.
      train_rows, test_rows: patterns of each specimen, at places drawn uniformly.
      photons: see above.
      seed: of specimens, places and counts.

    Returns:
      (train, test): `read` gives patterns, uint8 `[m, side, side, 1]`; `targets` are "amplitude" and "phase", float32
      `[n, side, side, 1]`.

    Raises:
      UserError: a size is out of range.
    """
    if not 8 <= side <= _FIELD - _TEST_FROM:
        raise wrong(f"ptychography:{side}", f"is not allowed, give a side of 8..{_FIELD - _TEST_FROM} pixels")
    check("photons", photons, POSITIVE)
    rng = np.random.Generator(np.random.Philox(seed))
    specimens = [specimen(absorption, shift, rng) for absorption, shift in zip(ABSORPTION, SHIFT, strict=True)]
    train = _scan(specimens, side, (0, _TEST_FROM), train_rows, photons, rng)
    return train, _scan(specimens, side, (_TEST_FROM, _FIELD), test_rows, photons, rng)


def _scan(
    specimens: list[np.ndarray],
    side: int,
    columns: tuple[int, int],
    rows: int,
    photons: float,
    rng: np.random.Generator,
) -> Source:
    """`rows` windows of each specimen, whose columns lie between the two."""
    windows = []
    for whole in specimens:
        top, left = rng.integers(0, _FIELD - side + 1, rows), rng.integers(columns[0], columns[1] - side + 1, rows)
        windows.append(np.stack([whole[y : y + side, x : x + side] for y, x in zip(top, left, strict=True)]))
    objects = np.concatenate(windows)
    counts = rng.poisson(photons * side**2 * diffract(probe(side), objects))
    targets = {"amplitude": np.abs(objects), "phase": np.angle(objects)}
    return Source(
        np.repeat(np.arange(SPECIMENS, dtype=np.int32), rows),
        (side, side, 1),
        tuple(f"specimen {number}" for number in range(SPECIMENS)),
        np.minimum(np.rint(np.sqrt(counts)), 255).astype(np.uint8)[..., None].__getitem__,
        targets={name: x.astype(np.float32)[..., None] for name, x in targets.items()},
    )


def probe(side: int) -> np.ndarray:
    """complex128 `[side, side]`, |.|^2 sums to 1."""
    x = np.arange(side) - (side - 1) / 2
    squares = x[:, None] ** 2 + x[None, :] ** 2
    beam = np.exp(-squares / (2 * (side / 3) ** 2) + 1j * np.pi * squares / side)
    return beam / np.linalg.norm(beam)


def diffract(beam: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """beam `[s, s]`, objects `[n, s, s]`, both complex -> the share of the photons that each pixel expects, `[n, s, s]`."""
    far = np.fft.fftshift(np.fft.fft2(beam * objects, norm="ortho"), axes=(-2, -1))
    return np.abs(far) ** 2


def specimen(absorption: float, shift: float, rng: np.random.Generator) -> np.ndarray:
    """A complex object [_FIELD, _FIELD] of one material, of structures a few pixels wide."""
    smooth = scipy.ndimage.gaussian_filter(rng.normal(size=(_FIELD, _FIELD)), _GRAIN, mode="wrap")
    thickness = 1 / (1 + np.exp(-4 * smooth / smooth.std()))
    return np.exp(-(absorption + 1j * shift) * thickness)
