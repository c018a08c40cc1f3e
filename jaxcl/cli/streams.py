"""Standard output and standard error that end no command: what cannot be written is dropped, or written with ? for a letter."""

import errno
import io
import os
import sys
from typing import Any


class _Dropping(io.FileIO):
    """Writes to a file descriptor.

    Attributes:
      error: the first of what was dropped; None without any.
    """

    error: OSError | None = None

    def write(self, data: bytes | bytearray | memoryview) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes


def open_all() -> None:
    """Puts such streams into `sys.stdout` and `sys.stderr`, unless somebody else has replaced them."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: else the next file opened, a checkpoint, would get this number and what is said
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _dropping(sys.stdout, 1)
    sys.stderr = _dropping(sys.stderr, 2)


def lost() -> str | None:
    """Why standard output lacks something, at the end of a command; None if nothing, or if its reader has left."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = getattr(raw, "error", None)
    return None if error is None or error.errno == errno.EPIPE else error.strerror


def _dropping(stream: Any, descriptor: int) -> Any:
    if stream is not None and not (type(stream) is io.TextIOWrapper and stream.fileno() == descriptor):
        return stream
    encoding = "utf-8" if stream is None else stream.encoding
    raw: Any = _Dropping(descriptor, "w", closefd=False)
    by_line = descriptor == 2 or (stream is not None and stream.line_buffering)
    at_once = stream is not None and stream.write_through  # python -u
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "replace", line_buffering=by_line, write_through=at_once)
