"""Where the rows of the host tier lie: in memory or in files, and whether there is room for them."""

import errno
import os
import pathlib
import shutil
from collections.abc import Sequence

import jax
import numpy as np

from jaxcl.errors import UserError
from jaxcl.memory import free_memory
from jaxcl.types import PyTree

MARK = b"\nrows of jaxcl\n"


def row_type(record: PyTree) -> np.dtype:
    """A record as one NumPy dtype without gaps: the bytes that `exchange.pack` makes, each leaf in its own dtype."""
    leaves = jax.tree_util.tree_leaves_with_path(record)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") or "row" for path, _ in leaves]
    return np.dtype([(name, x.dtype, x.shape) for name, (_, x) in zip(names, leaves, strict=True)])


def allocate(devices: list[int], slots: int, row: np.dtype, path: str | None) -> list[np.ndarray]:
    """Zeros `[slots]` for each device, in memory or in files of the folder `path`, which are made anew.

    A file ends with a mark, behind the rows, by which it is ours to replace: a run that was killed has left it.

    Raises:
      UserError: they cannot fit; says the bytes asked for and those there are. Or a file of someone else has the name of one.
    """
    each = slots * row.itemsize
    need = each * len(devices)
    if path is None:
        _check_room("buffer.capacity", need, free_memory(), "host memory", "less, or a folder in buffer.path")
        return [np.zeros(slots, row) for _ in devices]
    folder = pathlib.Path(path)
    names = [folder / f"shard-{device:05d}.rows" for device in devices]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            _check_ours(name)
        for name in names:
            name.unlink(missing_ok=True)
        there = shutil.disk_usage(folder).free
        if need > there:
            raise OSError(errno.ENOSPC, "")
        for name in names:
            with name.open("xb") as file:
                file.seek(each)
                file.write(MARK)
                file.flush()
                os.posix_fallocate(file.fileno(), 0, each)  # or a full disk would kill the process at some later write
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise UserError(f"buffer.path: {folder} cannot be written: {error.strerror or error}") from error
        raise UserError(f"buffer.path: the rows need {need} bytes in {folder} and {there} are there") from error
    return [np.memmap(name, row, "r+", shape=(slots,)) for name in names]


def _check_ours(name: pathlib.Path) -> None:
    """Whether a file of rows may take this name: none has it, or one with the mark, or an empty one, which is a torn one."""
    if not os.path.lexists(name):
        return
    if name.is_file() and not name.is_symlink():
        with name.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - len(MARK)))
            if file.read() in (MARK, b""):
                return
    raise UserError(f"buffer.path: {name} is not a file of rows of jaxcl; remove it or give another folder")


def check_fits(field: str, each: int, devices: Sequence[jax.Device]) -> None:
    """Whether every one of this process's `devices` can hold `each` bytes more; where a device does not say, it is believed.

    Raises:
      UserError: it cannot; names the field, the bytes asked for and those there are.
    """
    if devices[0].platform == "cpu":  # they share the host's memory
        _check_room(field, each * len(devices), free_memory(), "host memory", "less")
        return
    for device in devices:
        found = device.memory_stats() or {}
        if "bytes_limit" in found:
            there = found["bytes_limit"] - found.get("bytes_in_use", 0)
            _check_room(field, each, there, f"the memory of {device}", "less")


def _check_room(field: str, need: int, there: int, where: str, advice: str) -> None:
    if need > there:
        raise UserError(f"{field}: the rows need {need} bytes of {where} and {there} are there, give {advice}")
