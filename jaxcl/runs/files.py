"""Files that are whole or not there, JSON that is as it was written, and the errors of a full disk."""

import contextlib
import errno
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from jaxcl.errors import StorageError, UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Damaged(UserError):
    """A file does not hold what was written there. The message names the file and what is wrong with it."""


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes whole or not at all, whenever the process is killed or the machine stops."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_json(path: pathlib.Path, value: Any) -> None:
    """As `write_whole`."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      Damaged: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise Damaged(f"{path} is damaged: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise Damaged(f"{path} is damaged: it holds no JSON object")
    return value


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The value with the field "checksum", the CRC-32 of the rest as JSON."""
    return {**value, "checksum": _seal(value)}


def read_sealed(path: pathlib.Path) -> dict[str, Any]:
    """What `sealed` gave.

    Raises:
      Damaged: the file cannot be read, or its contents are not those of its checksum.
    """
    value = read_json(path)
    if "checksum" not in value:
        raise Damaged(f"{path} is damaged: it has no checksum")
    if value["checksum"] != _seal({name: x for name, x in value.items() if name != "checksum"}):
        raise Damaged(f"{path} is damaged: its checksum is that of other contents")
    return value


def _seal(value: dict[str, Any]) -> int:
    plain = json.loads(json.dumps(value))  # keys are strings, as they are when the file is read
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def checksum(path: pathlib.Path, sync: bool = False) -> list[int]:
    """[size, CRC-32] of a file; with `sync` it is on disk afterwards."""
    size = crc = 0
    with path.open("rb+" if sync else "rb") as stream:
        while block := stream.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
        if sync:
            os.fsync(stream.fileno())
    return [size, crc]


def sync_folder(path: pathlib.Path) -> None:
    """Makes the names in a folder durable: without it a rename may be lost with the machine's power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def full_disk_is_a_storage_error(folder: pathlib.Path) -> Iterator[None]:
    """Within, an OSError that says "no room to write" becomes a StorageError of one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageError(
            f"{error.filename or folder}: {error.strerror}; the last whole checkpoint is kept: make room, start again"
        ) from error
