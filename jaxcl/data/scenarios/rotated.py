"""`rotated`: all rows, turned about the centre by an angle of the task's own, uniform in 0..180 degrees; linear interpolation,
black outside. Lopez-Paz & Ranzato 2017."""

import numpy as np
import scipy.ndimage

from jaxcl.data.scenarios.base import Made, Split, repeat


def rotated(split: Split) -> Made:
    angle = split.rng().uniform(0, 180, split.repeats())

    def change(task: int, images: np.ndarray) -> np.ndarray:
        return scipy.ndimage.rotate(images, angle[task], axes=(1, 2), reshape=False, order=1)

    return repeat(split, change)
