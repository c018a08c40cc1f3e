"""`folder:DIR`: PNG and JPEG files, a folder for each class, in DIR/train and DIR/test, or in DIR itself.

Classes and files are sorted by name, the classes are named as their folders. Without train and test a fifth of every class is
for testing, drawn with a fixed seed. Images have one size, or are cut to `data.image_size`. They are grey if all are, else RGB;
transparency is dropped, and the orientation that a camera notes is not applied. What is hidden (.NAME) or no PNG or JPEG by its
name is left out, which one line says. The header of every file is read as the set is opened.
"""

import logging
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.source import Source
from jaxcl.data.sources._encoded import Encoded, apart, shape_of
from jaxcl.data.sources.base import check_labels, whole, wrong

ENDINGS = (".jpeg", ".jpg", ".png")
_SPLITS = ("train", "test")
_log = logging.getLogger("jaxcl")


class Files(NamedTuple):
    """The files of a split.

    Attributes:
      paths: `[n]`, class by class.
      labels: int32 `[n]`.
    """

    paths: list[pathlib.Path]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def called(self, row: int) -> str:
        return str(self.paths[row])

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [{"image": self.paths[row].read_bytes(), "label": self.labels[row]} for row in rows]


def folder(*, rest: str, image_size: int | None, cache_bytes: int, **_: Any) -> tuple[Source, Source]:
    """Opens the folder `rest`. See `open_source`."""
    name = f"folder:{rest}"
    if not rest:
        raise wrong("folder", "is not allowed, give folder:DIR")
    root = pathlib.Path(rest).expanduser()
    if not root.is_dir():
        raise wrong(name, f"cannot be read: there is no folder {root.absolute()}")
    parts = [root / split for split in _SPLITS if (root / split).is_dir()]
    if len(parts) == 1:
        raise wrong(name, f"has {parts[0].name} alone, give train and test, or a folder for each class")
    parts = parts or [root]
    with whole(name, root):
        class_names = sorted({path.name for part in parts for path in _folders(part)})
        if not class_names:
            raise wrong(name, f"has no folders, give one for each class in {root}, with PNG or JPEG files")
        found = [_files(name, part, class_names) for part in parts]
        paths = [path for files in found for path in files.paths]
        shape = shape_of(name, len(paths), paths.__getitem__, image_size)
        cached = image_size is None and sum(map(len, found)) * math.prod(shape) <= cache_bytes
        sources = []
        for part, files in zip(parts, found, strict=True):
            check_labels(name, str(part), files.labels, len(class_names))
            encoded = Encoded(files, "image", "label", shape, files.called)
            images = np.empty((len(files), *shape), np.uint8) if cached else None
            if cached:
                encoded.scan(images)
            sources.append(encoded.source(files.labels, tuple(class_names), images, image_size))
    return apart(name, sources)


def _folders(part: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in part.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _files(name: str, part: pathlib.Path, class_names: Sequence[str]) -> Files:
    """What a split holds; one line on what is left out."""
    paths: list[pathlib.Path] = []
    labels: list[int] = []
    others = [path for path in part.iterdir() if path.name.startswith(".") or not path.is_dir()]
    for label, class_name in enumerate(class_names):
        inside = sorted((part / class_name).iterdir()) if (part / class_name).is_dir() else []
        kept = [x for x in inside if x.suffix.lower() in ENDINGS and not x.name.startswith(".") and x.is_file()]
        paths += kept
        labels += [label] * len(kept)
        others += sorted(set(inside) - set(kept))
    if others:
        count = f"{len(others)} files or folders" if len(others) > 1 else "one file or folder"
        _log.warning("%s: %s in %s left out, no PNG or JPEG: %s", name, count, part, min(others).relative_to(part))
    return Files(paths, np.asarray(labels, np.int32))
