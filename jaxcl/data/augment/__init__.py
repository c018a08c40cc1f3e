"""Augmentation on the device; one file an augmentation.

A file NAME.py has a function `NAME(key, image [H, W, C]) -> image [H, W, C]`, of the image's shape and dtype (uint8), which is
mapped over the rows of a batch.
"""

from jaxcl.data.augment.base import AUGMENTATIONS, Augment, Normalize, make_augment, make_normalize

__all__ = ["AUGMENTATIONS", "Augment", "Normalize", "make_augment", "make_normalize"]
