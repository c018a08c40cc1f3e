"""The log of a run: metrics.jsonl, one line for each thing measured; its scalars also go to the writers of the config."""

import json
import logging
import os
import pathlib
import shutil
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcl.runs import files
from jaxcl.runs.writers import Setting, Writers
from jaxcl.runs.writers.tensorboard import EVENTS

NAME, ASIDE = "metrics.jsonl", "metrics.jsonl.corrupt"
_log = logging.getLogger("jaxcl")


def restore(workdir: pathlib.Path, saved: Sequence[int] | None) -> None:
    """Makes metrics.jsonl what it was at a checkpoint; to be called by one process, before it opens its `Log`.

    What was written after the checkpoint is cut off, since the continued run writes it again. If the rest was damaged, its
    whole lines are kept, a copy of the damaged file lies beside it, and one line says so.

    Args:
      saved: what `Log.saved` gave at the checkpoint; None without a checkpoint, when the run begins anew.
    """
    path = workdir / NAME
    before = path.read_bytes() if path.exists() else b""
    if saved is None:
        if before:
            _log.warning("%s: no checkpoint to continue from: the run and its log begin anew", workdir)
        for old in (*workdir.glob(EVENTS), path):
            old.unlink(missing_ok=True)
        return
    size, crc = saved
    kept = before[:size]
    if [len(kept), zlib.crc32(kept)] == [size, crc]:
        if before:
            os.truncate(path, size)
        return
    lines = kept.splitlines(keepends=True)
    whole = [line for line in lines if _is_whole(line)]
    aside = workdir / ASIDE
    if before and not aside.exists():
        shutil.copy(path, aside)
    files.write_whole(path, b"".join(whole))
    _log.warning(
        "%s is damaged (%d of the %d bytes at the checkpoint, %d of %d lines whole): these lines are kept%s; "
        "scores are in the checkpoint and not lost",
        *(path, len(kept), size, len(whole), len(lines), f", the file is copied to {aside.name}" if before else ""),
    )


def _is_whole(line: bytes) -> bool:
    try:
        value = json.loads(line)
        return line.endswith(b"\n") and isinstance(value, dict) and "kind" in value
    except (ValueError, RecursionError):
        return False


class Log:
    """Appends to metrics.jsonl, and hands scalars on to writers; does nothing on processes that do not write.

    Args:
      step: of the checkpoint to continue from; None for a new run.
      writers, settings: see `jaxcl.runs.writers`.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        write: bool,
        step: int | None = None,
        writers: Sequence[str] = (),
        settings: Mapping[str, Setting] | None = None,
    ):
        self._lines = None
        if not write:
            return
        path = workdir / NAME
        self._crc = files.checksum(path)[1] if path.exists() else 0
        self._lines = path.open("ab")
        self._writers = Writers(writers, workdir, settings or {}, step)

    def saved(self) -> list[int]:
        """[size, CRC-32] of metrics.jsonl, all of it on disk."""
        if self._lines is None:
            return [0, 0]
        os.fsync(self._lines.fileno())
        return [self._lines.tell(), self._crc]

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line; its scalars also go to the writers as `kind/name`."""
        if self._lines is None:
            return
        line = (json.dumps({"kind": kind, "step": step, **values}) + "\n").encode()
        self._lines.write(line)
        self._lines.flush()
        self._crc = zlib.crc32(line, self._crc)
        self.show(step, {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, float)})

    def show(self, step: int, scalars: Mapping[str, float]) -> None:
        """To the writers alone: what follows from lines of metrics.jsonl, or is not the same when a run is repeated."""
        if self._lines is not None and scalars:
            self._writers.write(step, scalars)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._writers.close()
