"""`hf:DIR`: a set of Hugging Face's `datasets`, saved to disk: a `DatasetDict` with train and test, or one `Dataset`.

DIR is what `save_to_disk` made: Arrow files, whose memory is mapped, and their features as JSON. Read are an image feature and
a class label, those called image (or img) and label (or labels, fine_label) where there are several. A split `validation`
stands in for a missing `test`; of one `Dataset` a fifth of every class is for testing, as in `folder`. The package `datasets`
is not needed.
"""

import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.source import Source
from jaxcl.data.sources._encoded import Encoded, apart, shape_of
from jaxcl.data.sources.base import brief, check_labels, whole, wrong
from jaxcl.sealed import Damaged, read_json

_NAMES = {"Image": ("image", "img"), "ClassLabel": ("label", "labels", "fine_label")}


class Table(NamedTuple):
    """The rows of a split.

    Attributes:
      images: of pyarrow: structs with the bytes of a file, "bytes".
      labels: int32 `[n]`.
      class_names: K names, by label.
    """

    images: Any
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [{"image": self.file(row), "label": self.labels[row]} for row in rows]

    def file(self, row: int) -> bytes:
        """The image of a row."""
        return self.images[row].as_py()["bytes"]


def hf(*, rest: str, image_size: int | None, cache_bytes: int, **_: Any) -> tuple[Source, Source]:
    """Opens the set saved in `rest`. See `open_source`."""
    name = f"hf:{rest}"
    if not rest:
        raise wrong("hf", "is not allowed, give hf:DIR")
    root = pathlib.Path(rest).expanduser()
    parts = _parts(name, root)
    with whole(name, root):
        tables = [_table(name, part) for part in parts]
        class_names = tables[0].class_names
        if any(table.class_names != class_names for table in tables):
            raise wrong(name, "has other class names in its splits, give one list of them")
        every = [(table, row) for table in tables for row in range(len(table))]
        shape = shape_of(name, len(every), lambda i: every[i][0].file(every[i][1]), image_size)
        cached = image_size is None and len(every) * math.prod(shape) <= cache_bytes
        sources = []
        for part, table in zip(parts, tables, strict=True):
            check_labels(name, str(part), table.labels, len(class_names))
            encoded = Encoded(table, "image", "label", shape, functools.partial("row {1} of {0}".format, part))
            images = np.empty((len(table), *shape), np.uint8) if cached else None
            if cached:
                encoded.scan(images)
            sources.append(encoded.source(table.labels, class_names, images, image_size))
    return apart(name, sources)


def _parts(name: str, root: pathlib.Path) -> list[pathlib.Path]:
    """The folders of the splits: train and test, or the one that there is."""
    if (root / "state.json").is_file():
        return [root]
    if not (root / "dataset_dict.json").is_file():
        there = (
            "holds no set that save_to_disk has made" if root.is_dir() else "cannot be read: there is no such folder"
        )
        raise wrong(name, there)
    splits = _json(name, root / "dataset_dict.json").get("splits", [])
    test = "test" if "test" in splits else "validation"
    if not {"train", test} <= set(splits):
        raise wrong(name, f"has splits {', '.join(splits)}, give a set with train and test or validation")
    return [root / "train", root / test]


def _table(name: str, part: pathlib.Path) -> Table:
    """A split: its files are mapped, nothing is decoded."""
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.ipc

    state, features = _json(name, part / "state.json"), _json(name, part / "dataset_info.json")["features"]
    image, label = (_feature(name, features, kind) for kind in _NAMES)
    if state.get("_indices_data_files"):
        raise wrong(
            name, f"has a selection of rows beside them in {part}, call flatten_indices() before save_to_disk()"
        )
    files = [part / found["filename"] for found in state["_data_files"]]
    tables = []
    for file in files:
        try:
            tables.append(pa.ipc.open_stream(pa.memory_map(str(file))).read_all().select([image, label]))
        except (OSError, pa.ArrowException) as error:
            raise wrong(name, f"has a file that cannot be read: {file}, is it damaged? ({brief(error)})") from None
    rows = pa.concat_tables(tables)
    images = rows.column(image)
    if images.null_count or pa.compute.struct_field(images, "bytes").null_count:
        raise wrong(name, f"has rows without an image in {part}, give files that are embedded")
    if rows.column(label).null_count:
        raise wrong(name, f"has rows without a label in {part}, give a label of every row")
    return Table(images, rows.column(label).to_numpy().astype(np.int32), tuple(features[label]["names"]))


def _json(name: str, path: pathlib.Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except Damaged as error:
        raise wrong(name, f"cannot be read: {error}") from None


def _feature(name: str, features: dict[str, Any], kind: str) -> str:
    """The one feature of a kind, or the one with a usual name."""
    found = [key for key, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == kind]
    usual = [key for key in _NAMES[kind] if key in found]
    if not usual and len(found) != 1:
        have = ", ".join(f"{key} ({x.get('_type', '?')})" for key, x in features.items() if isinstance(x, dict))
        raise wrong(
            name,
            f"has features {have}, give an Image and a ClassLabel, called {' and '.join(x[0] for x in _NAMES.values())}",
        )
    return (usual or found)[0]
