"""Sources of pairs for contrastive learning: images with captions, with the names of their classes, or in a second style.

A source of pairs is a `Source` whose labels are keys, the same for rows that match each other, and whose targets hold the
other side: "text", tokens int32 [n, L], or "image", uint8 [n, H, W, C]. The loader needs to know nothing of it.
"""

import dataclasses
import os
import zipfile
from typing import Any

import numpy as np

from jaxcl.data import crop, sources, text
from jaxcl.data.sources import Source, array_source, open_source
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
      name: "emoji:FILE", an archive of `noto` uint8 [n, H, W, 3], `caption` and, for styles, `emojitwo` with
        `has_emojitwo`; "tfds:coco_captions", every caption a row; or what `open_source` takes, with the names of the
        classes as text.
      pairs: "captions", "views" (the image alone) or "styles".
      held_out: share of the pairs that are for testing, where the source has no test rows of its own.
      split_seed: which.
      length, vocabulary: see `text.tokens`.

    Raises:
      UserError: the set is unknown, or has no such pairs.
    """
    kind, _, rest = name.partition(":")
    if pairs == "styles" and kind != "emoji":
        raise UserError(f"data.pairs: styles needs emoji:FILE, {name!r} has one picture of each thing")
    if kind == "emoji" and rest:
        return _emoji(name, rest, pairs, held_out, split_seed, length, vocabulary)
    if name == COCO:
        return _coco(data_dir, pairs, image_size or 64, length, vocabulary)
    train, test = open_source(name, data_dir, image_size=image_size)
    if train.targets:
        raise UserError(
            f"dataset {name!r}: images to be reconstructed have no class names; give one of labelled images"
        )
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
    try:
        with np.load(os.path.expanduser(path)) as archive:
            images, captions = archive["noto"], [str(x) for x in archive["caption"]]
            has, others = archive["has_emojitwo"], archive["emojitwo"]
    except FileNotFoundError:
        raise UserError(f"dataset {name!r}: there is no file {os.path.abspath(path)}") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"dataset {name!r}: not an archive of emoji pairs ({' '.join(str(error).split())})") from None
    if pairs == "styles":
        images, captions = images[has], [x for x, both in zip(captions, has, strict=True) if both]
    key = np.unique(captions, return_inverse=True)[1] if pairs == "captions" else np.arange(len(images))
    order = np.random.Generator(np.random.Philox(split_seed)).permutation(len(images))
    border = len(images) - round(held_out * len(images))

    def part(rows: np.ndarray) -> Source:
        found = array_source(images[rows], key[rows], captions)
        if pairs == "captions":
            words = text.tokens([captions[i] for i in rows], length, vocabulary)
            return dataclasses.replace(found, targets={"text": words})
        return dataclasses.replace(found, targets={"image": others[rows]} if pairs == "styles" else {})

    return part(np.sort(order[:border])), part(np.sort(order[border:]))


def _coco(data_dir: str | None, pairs: str, image_size: int, length: int, vocabulary: int) -> tuple[Source, Source]:
    """MS-COCO captions (Chen et al. 2015) as TFDS prepares them: about 82,783 + 40,504 images with five captions each.

    A row is a caption, the images' middle squares are decoded batch by batch, and the keys are the images' numbers.
    """
    train, test = sources.open_examples(COCO, data_dir, ("train", "val"))
    return tuple(_coco_split(x, pairs, image_size, length, vocabulary) for x in (train, test))  # type: ignore[return-value]


def _coco_split(examples: Any, pairs: str, side: int, length: int, vocabulary: int) -> Source:
    captions = [_captions(example) for example in examples]
    owner = np.repeat(np.arange(len(captions)), [len(x) for x in captions] if pairs == "captions" else 1)
    words = [x for several in captions for x in several] if pairs == "captions" else []

    def read(rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), side, side, 3), np.uint8)
        numbers = owner[rows].tolist()
        for image, example in zip(found, examples.__getitems__(numbers), strict=True):
            image[:] = crop.middle(example["image"], (side, side, 3))
        return found

    targets = {"text": text.tokens(words, length, vocabulary)} if words else {}
    return Source(owner.astype(np.int32), (side, side, 3), ("image",) * len(captions), read, targets=targets)


def _captions(example: dict[str, Any]) -> list[str]:
    """Those of one image: TFDS gives a sequence of features as a dict of lists or as a list of dicts."""
    found = example["captions"]
    texts = found["text"] if isinstance(found, dict) else [x["text"] for x in found]
    return [x.decode() if isinstance(x, bytes) else str(x) for x in texts]
