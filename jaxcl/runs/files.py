"""Files that are whole or not there, and the names of the errors that a full disk gives."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from jaxcl.errors import StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes whole or not at all, whenever the process is killed or the machine stops."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


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
