"""The log of a run: metrics.jsonl, one line for each thing measured, and the same as TensorBoard events."""

import contextlib
import json
import logging
import os
import pathlib
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcl.runs import files

NAME, ASIDE = "metrics.jsonl", "metrics.jsonl.corrupt"
_MARK = ".jaxcl"  # the end of the name of our TensorBoard events: a folder may hold those of others
EVENTS = f"events.out.*{_MARK}"
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
    """Appends to the log; does nothing on processes that do not write.

    Args:
      step: of the checkpoint to continue from, after which TensorBoard hides what is there; None for a new run.
    """

    def __init__(self, workdir: pathlib.Path, write: bool, step: int | None = None):
        self._lines = self._events = None
        if not write:
            return
        # Not its SummaryWriter: the thread of that dies of a full disk, with a trace, and who writes then waits for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        path = workdir / NAME
        self._crc = files.checksum(path)[1] if path.exists() else 0
        self._lines = path.open("ab")
        self._events = EventsWriter(str(workdir / "events"), _MARK)
        if step is not None:
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def saved(self) -> list[int]:
        """[size, CRC-32] of metrics.jsonl, all of it on disk."""
        if self._lines is None:
            return [0, 0]
        os.fsync(self._lines.fileno())
        return [self._lines.tell(), self._crc]

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line; scalars also go to TensorBoard as `kind/name`."""
        if self._lines is None or self._events is None:
            return
        line = (json.dumps({"kind": kind, "step": step, **values}) + "\n").encode()
        self._lines.write(line)
        self._lines.flush()
        self._crc = zlib.crc32(line, self._crc)
        self._add(step, {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, float)})

    def write_seconds(self, step: int, foreground: Mapping[str, float], background: Mapping[str, float]) -> None:
        """Seconds by phase so far, of the loop and of the buffer's writer; to TensorBoard alone, as metrics.jsonl holds what
        a repeated run has again."""
        for kind, seconds in (("foreground", foreground), ("background", background)):
            self._add(step, {f"seconds_{kind}/{name}": value for name, value in seconds.items()})

    def _add(self, step: int, scalars: dict[str, float]) -> None:
        """To TensorBoard."""
        if self._events is None:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in scalars.items():
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._events.flush()

    def close(self) -> None:
        if self._lines is not None and self._events is not None:
            self._lines.close()
            with contextlib.suppress(OSError):  # on a full disk: what ended the run has been said
                self._events.close()
