"""scalars.csv in the run's folder: one line a scalar, `step,name,value`, for a spreadsheet or pandas."""

import pathlib
from collections.abc import Mapping
from typing import TextIO

from jaxcl.errors import UserError
from jaxcl.runs import files
from jaxcl.runs.writers.base import Setting, Writer

NAME, HEADER = "scalars.csv", "step,name,value\n"


def csv(folder: pathlib.Path, settings: Mapping[str, Setting], step: int | None) -> Writer:
    """Of an earlier session the whole lines up to `step` are kept.

    Raises:
      UserError: the file is of someone else.
    """
    path = folder / NAME
    if path.exists() and not is_ours(path):
        raise UserError(f"{path} is not a file of jaxcl; remove it")
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else [HEADER]
    kept = [line for line in lines[1:] if step is not None and _step(line) <= step]
    files.write_whole(path, "".join([HEADER, *kept]).encode())
    return _Lines(path.open("a"))


def is_ours(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        return file.readline(len(HEADER)) == HEADER.encode()


def _step(line: str) -> float:
    """Of a line; of one that is torn, more than any."""
    first = line.partition(",")[0]
    return int(first) if line.endswith("\n") and line.count(",") == 2 and first.isdigit() else float("inf")


class _Lines:
    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._file.writelines(f"{step},{name.replace(',', ';')},{value!r}\n" for name, value in scalars.items())
        self._file.flush()

    def close(self) -> None:
        self._file.close()
