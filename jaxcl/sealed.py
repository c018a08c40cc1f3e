"""JSON objects that are as they were written: a sealed one carries the checksum of its own contents."""

import json
import pathlib
import zlib
from typing import Any

from jaxcl.errors import UserError


class Damaged(UserError):
    """A file does not hold what was written there. The message names the file and what is wrong with it."""


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
    return check_seal(read_json(path), path)


def check_seal(value: Any, path: pathlib.Path) -> dict[str, Any]:
    """The value, which comes from `path`, if `sealed` gave it.

    Raises:
      Damaged: it did not, or not so.
    """
    if not isinstance(value, dict) or "checksum" not in value:
        raise Damaged(f"{path} is damaged: it has no checksum")
    if value["checksum"] != _seal({name: x for name, x in value.items() if name != "checksum"}):
        raise Damaged(f"{path} is damaged: its checksum is that of other contents")
    return value


def _seal(value: dict[str, Any]) -> int:
    plain = json.loads(json.dumps(value))  # keys are strings, as they are when the file is read
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())
