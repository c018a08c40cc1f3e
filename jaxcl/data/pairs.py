"""Sources of pairs for contrastive learning: images with captions, with the names of their classes, or in a second style.

A source of pairs is a `Source` whose labels are keys, the same for rows that match each other, and whose targets hold the
other side: "text", tokens int32 `[n, L]`, or "image", uint8 `[n, H, W, C]`. The loader treats it as any other.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxcl.data import text, window
from jaxcl.data.source import Source, array_source
from jaxcl.data.sources import npz, open_source, tfds
from jaxcl.data.sources.base import read_each, whole, wrong
from jaxcl.errors import UserError

COCO = "tfds:coco_captions"
SENTENCE = "a picture of {}"


def open_pairs(
    name: str,
    pairs: str,
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    held_out: float = 0.2,
    split_seed: int = 0,
    length: int = 48,
    vocabulary: int = 4096,
) -> tuple[Source, Source]:
    """Opens a data set and returns its (train, test) pairs.

    Args:
      name: "emoji:FILE", an archive of `noto` uint8 `[n, H, W, 3]`, `caption` and, for styles, `emojitwo` with
        `has_emojitwo`; "tfds:coco_captions", every caption a row; or what `open_source` takes, with the names of the
        classes as text.
      pairs: "captions", "views" (the image alone) or "styles".
      held_out: share of the pairs that are for testing, where the source has no test rows of its own.
      split_seed: chooses them.
      length, vocabulary: see `text.tokens`.

    Raises:
      UserError: the set is unknown, or has no such pairs.
    """
    kind, _, rest = name.partition(":")
    if pairs == "styles" and kind != "emoji":
        raise UserError(f"data.pairs: 'styles' is not allowed with {name!r}, give data.source = emoji:FILE")
    if kind == "emoji" and rest:
        return _emoji(name, rest, pairs, held_out, split_seed, length, vocabulary)
    if name == COCO:
        train, test = (
            _coco(examples, pairs, image_size or 64, length, vocabulary)
            for examples in tfds.open_examples(COCO, data_dir, ("train", "val"))
        )
        return train, test
    train, test = open_source(name, data_dir, image_size=image_size)
    if train.targets:
        raise wrong(name, "has images to be reconstructed and no class names, give a set of labelled images")
    if pairs == "views":
        return _keyed_by_row(train), _keyed_by_row(test)
    names = text.tokens([SENTENCE.format(x) for x in train.class_names], length, vocabulary)
    train, test = (dataclasses.replace(x, targets={"text": names[x.labels]}) for x in (train, test))
    return train, test


def _keyed_by_row(source: Source) -> Source:
    return dataclasses.replace(source, labels=np.arange(len(source), dtype=np.int32))


def _emoji(
    name: str, path: str, pairs: str, held_out: float, split_seed: int, length: int, vocabulary: int
) -> tuple[Source, Source]:
    found = npz.read_arrays(name, path, ("noto", "caption", "emojitwo", "has_emojitwo"))
    images, captions, has = found["noto"], [str(x) for x in found["caption"]], found["has_emojitwo"]
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images) == len(captions) == len(has) > 0:
        raise wrong(name, f"has noto of {images.dtype} {images.shape}, give uint8 [n, H, W, 3], and n captions")
    if has.dtype != bool or found["emojitwo"].shape != (has.sum(), *images.shape[1:]):
        raise wrong(name, f"has emojitwo of shape {found['emojitwo'].shape}, give an image where has_emojitwo is True")
    targets = {}
    if pairs == "styles":
        images, captions = images[has], [x for x, both in zip(captions, has, strict=True) if both]
        targets = {"image": found["emojitwo"]}
    if pairs == "captions":
        targets = {"text": text.tokens(captions, length, vocabulary)}
    key = np.unique(captions, return_inverse=True)[1] if pairs == "captions" else np.arange(len(images))
    every = dataclasses.replace(array_source(images, key, captions), targets=targets)
    order = np.random.Generator(np.random.Philox(split_seed)).permutation(len(images))
    border = len(images) - round(held_out * len(images))
    return every.part(np.sort(order[:border])), every.part(np.sort(order[border:]))


def _coco(examples: Any, pairs: str, side: int, length: int, vocabulary: int) -> Source:
    """A split of MS-COCO captions (Chen et al. 2015) as TFDS prepares it: 82,783 or 40,504 images with five captions each.

    A row is a caption, the images' middle squares are decoded batch by batch, and the keys are the images' numbers.
    """
    with whole(COCO, "its folder"):
        captions = [_captions(example) for example in examples]
    owner = np.repeat(np.arange(len(captions)), [len(x) for x in captions] if pairs == "captions" else 1)
    words = [x for several in captions for x in several] if pairs == "captions" else []

    def read(rows: np.ndarray) -> np.ndarray:
        shape = (side, side, 3)
        images = read_each(
            f"record {{}} of {COCO}".format,
            examples,
            owner[rows].tolist(),
            lambda x, _: window.middle(x["image"], shape),
        )
        return np.stack(images) if images else np.empty((0, *shape), np.uint8)

    targets = {"text": text.tokens(words, length, vocabulary)} if words else {}
    return Source(owner.astype(np.int32), (side, side, 3), ("image",) * len(captions), read, targets=targets)


def _captions(example: dict[str, Any]) -> list[str]:
    """Those of one image: TFDS gives a sequence of features as a dict of lists or as a list of dicts."""
    found = example["captions"]
    texts = found["text"] if isinstance(found, dict) else [x["text"] for x in found]
    return [x.decode() if isinstance(x, bytes) else str(x) for x in texts]
