"""Files that are whole or not there, their checksums, and the errors of a full disk."""

import contextlib
import errno
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from jaxcl.errors import StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes whole or not at all, whenever the process is killed or the machine stops."""
    temporary = path.with_name(f".{path.name}.tmp")  # a name that nobody else gives
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_json(path: pathlib.Path, value: Any) -> None:
    """As `write_whole`."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


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
