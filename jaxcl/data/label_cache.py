"""A cache of labels: those of a large data set, kept in a file of the user's cache folder.

A split into tasks needs every label at the start, and TFDS yields a label only with its whole record: for ImageNet-1k that
is a pass over 140 GB. Done once, it leaves 5 MB in `$XDG_CACHE_HOME/jaxcl` (~/.cache/jaxcl).
"""

import contextlib
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np


def cached(builder: Any, split: str, rows: int, read: Callable[[], np.ndarray]) -> np.ndarray:
    """The labels of a split, int32 `[rows]`: from the cache, else by `read`, whose answer is then kept.

    A file belongs to one preparation of one data set: its name, version and split, its folder and when it was prepared, rows
    and bytes. One that is torn or of another size is read anew; a cache that cannot be written is done without.
    """
    path = _file(builder, split, rows)
    try:
        labels = np.load(path, allow_pickle=False)
        if labels.shape == (rows,) and labels.dtype == np.int32:
            return labels
    except (OSError, ValueError, EOFError):
        pass
    labels = read()
    with contextlib.suppress(OSError):
        _write(path, labels)
    return labels


def _file(builder: Any, split: str, rows: int) -> pathlib.Path:
    info = pathlib.Path(builder.data_path) / "dataset_info.json"
    found = builder.info.splits[split]
    identity = (str(info.resolve()), info.stat().st_mtime_ns, found.shard_lengths, found.num_bytes)
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxcl" / "labels"
    return folder / f"{builder.info.full_name.replace('/', '-')}-{split}-{rows}-{digest}.npy"


def _write(path: pathlib.Path, labels: np.ndarray) -> None:
    """Whole or not at all, also where several processes write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.save(file, labels)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
