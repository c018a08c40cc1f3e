"""`permuted`: all rows, their pixels in an order of the task's own, channels together. Goodfellow et al. 2013, Kirkpatrick et
al. 2017."""

import numpy as np

from jaxcl.data.scenarios.base import Made, Split, repeat


def permuted(split: Split) -> Made:
    (height, width, channels), rng = split.train.image_shape, split.rng()
    order = [rng.permutation(height * width) for _ in range(split.repeats())]

    def change(task: int, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1, channels)[:, order[task]].reshape(images.shape)

    return repeat(split, change)
