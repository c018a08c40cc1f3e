"""Aliases used everywhere, and the letters that docstrings write shapes with.

Shapes stand in brackets behind the dtype: uint8 `[b, H, W, C]`. A letter means the same in every file:

    b, r, c    rows of a device in a step: new ones, representatives, candidates
    B, R       the same over all devices: B = N b, R = N r
    N          devices, and so shards of the buffer
    n          any number of rows
    H, W, C    height, width and channels of an image
    K, T       classes, tasks
    D          features
"""

from typing import Any

import jax

PyTree = Any  # nested containers of arrays
Number = (
    float | jax.Array
)  # a number that may be traced; of a strategy's option: runs that differ in it share one program
Batch = dict[str, Any]  # rows on their way to a step: "image", "label", "id", "valid", and "target" where there is one
