"""A folder of NumPy files that is whole or not there, with a manifest that tells whether they are as they were written.

It grows under another name, is made durable and then renamed. One that it replaces is renamed before and removed after.
"""

import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from jax.experimental import multihost_utils

from jaxcl.check import refused
from jaxcl.errors import UserError

FORMAT = "jaxcl.buffer 1"
MANIFEST = "manifest.json"
SUM = 40  # bytes of a file's size and SHA-256
T = TypeVar("T")


def begin(final: pathlib.Path, overwrite: bool) -> None:
    if final.exists() and not (_is_ours(final) and (final / MANIFEST).exists()):
        raise refused("folder", str(final), "a new one: it is there and not a saved buffer alone")
    if final.exists() and not overwrite:
        raise refused("folder", str(final), "a new one, or overwrite=True to replace the buffer that is saved there")
    _remove(growing(final))
    growing(final).mkdir(parents=True)


def end(final: pathlib.Path, manifest: dict[str, Any]) -> None:
    manifest = {"format": FORMAT, **manifest}
    with (growing(final) / MANIFEST).open("w") as file:
        json.dump({**manifest, "sha256": _seal(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync(growing(final))
    replaced = _replaced(final)
    if final.exists():
        _remove(replaced)
        final.rename(replaced)
    growing(final).rename(final)
    sync(final.parent)
    _remove(replaced)


def growing(final: pathlib.Path) -> pathlib.Path:
    """Where a folder is until it is whole."""
    return final.with_name(final.name + ".saving")


def _replaced(final: pathlib.Path) -> pathlib.Path:
    """Where a folder is while another takes its place."""
    return final.with_name(final.name + ".replaced")


def _is_ours(folder: pathlib.Path) -> bool:
    inside = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return folder.is_dir() and all(re.fullmatch(r"manifest\.json|shard-\d{5}(/[^/]+\.npy)?", name) for name in inside)


def _remove(folder: pathlib.Path) -> None:
    """Removes what an interrupted save has left."""
    if folder.exists():
        if not _is_ours(folder):
            raise UserError(f"folder: {folder} is in the way, and not of an interrupted save alone: remove it")
        shutil.rmtree(folder)


def write(path: pathlib.Path, blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Writes an array of this shape and dtype, given some rows at a time; its size and checksum, uint8 `[SUM]`."""
    header, digest = io.BytesIO(), hashlib.sha256()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    flat = (np.ascontiguousarray(block).reshape(-1).view(np.uint8).data for block in blocks)
    with path.open("wb") as file:
        for part in itertools.chain([header.getbuffer()], flat):
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return np.frombuffer(size.to_bytes(8, "little") + digest.digest(), np.uint8)


def as_json(both: np.ndarray) -> dict[str, Any]:
    raw = both.tobytes()
    return {"bytes": int.from_bytes(raw[:8], "little"), "sha256": raw[8:].hex()}


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        other = _replaced(folder)
        advice = f"; {other} is what an interrupted save has left: rename it" if other.exists() else ""
        raise UserError(f"folder: {folder} holds no saved buffer{advice}")
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        seal = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged: {error}") from error
    if seal != _seal(manifest):
        raise UserError(f"{folder / MANIFEST} is damaged: its contents are others than were written")
    if manifest["format"] != FORMAT:
        raise UserError(f"{folder}: its format is {manifest['format']}, this version reads {FORMAT}")
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read(folder: pathlib.Path, name: str, files: dict[str, Any]) -> np.ndarray:
    """An array, a map of its file."""
    try:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        if {"bytes": size, "sha256": digest} != files[name]:
            raise UserError(f"{folder / name} is damaged: its {size} bytes are others than were written")
        return np.load(folder / name, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"{folder / name} is damaged: {error.strerror}") from error


def sync(folder: pathlib.Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def in_one_line(folder: pathlib.Path, call: Callable[[], None]) -> None:
    try:
        call()
    except OSError as error:
        raise UserError(f"folder: {folder} cannot be written: {error.strerror or error}") from error


def together(call: Callable[[], T]) -> T:
    """What `call` returns, if it does on every process.

    Raises:
      UserError: that of this process, or one that says that another one has met with one.
    """
    problem: UserError | None = None
    try:
        value = call()
    except UserError as error:
        problem = error
    failed = multihost_utils.process_allgather(np.int32(problem is not None))
    if problem is not None:
        raise problem
    if failed.any():
        raise UserError("folder: another process could not read or write its part, see its log")
    return value
