"""What a run leaves in its folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/, result.json."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.runs import files

# Fields that a run may change when it continues, because its result does not depend on them.
FREE = ("config.checkpoint", "config.data.threads")


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON gives it back: plain dicts, lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds `workdir`, made if needed, against other runs. The lock goes with the process, however it ends.

    Raises:
      UserError: another process holds it, or it cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"workdir: {workdir} cannot be used: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"workdir: {workdir} is in use by another run; wait for it or give another folder"
            ) from error
        yield


def claim(workdir: pathlib.Path, config: ConfigDict, overwrite: bool = False) -> dict[str, Any] | None:
    """Takes `workdir`, which must be `locked`, for a run of `config`, new or to be continued.

    Returns:
      The result of a finished run of the same config, else None; the folder then holds config.json.

    Raises:
      UserError: the folder holds another config's run, or cannot be written.
    """
    mine, path = resolved(config), workdir / "config.json"
    try:
        if overwrite:
            clear(workdir)
        if path.exists():
            theirs = json.loads(path.read_text())
            check_same(theirs, config, f"workdir: {workdir} holds another config's run", "; give another folder")
            result = workdir / "result.json"
            if result.exists():
                return json.loads(result.read_text())
        files.write_json(path, mine)
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"workdir: {workdir} cannot be used: {error}") from error
    return None


def clear(workdir: pathlib.Path) -> None:
    """Removes a run, and nothing else, from `workdir`."""
    for name in ("config.json", "result.json", "metrics.jsonl"):
        (workdir / name).unlink(missing_ok=True)
    for events in workdir.glob("events.out.*"):
        events.unlink()
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)


def check_same(theirs: dict[str, Any], config: ConfigDict, problem: str, advice: str = "") -> None:
    """Compares a resolved config with this one, but for the fields that a run may change.

    Raises:
      UserError: they differ; `problem`, the first field that does, `advice`.
    """
    difference = _difference(theirs, resolved(config))
    if difference:
        raise UserError(f"{problem} ({difference}){advice}")


def _difference(theirs: Any, mine: Any, path: str = "config") -> str | None:
    """The first field in which two resolved configs differ, in words; None if they are equal."""
    if path in FREE:
        return None
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for name in sorted({*theirs, *mine}):
            found = _difference(theirs.get(name), mine.get(name), f"{path}.{name}")
            if found:
                return found
        return None
    return None if theirs == mine else f"{path} is {theirs!r} there, {mine!r} here"


class Log:
    """metrics.jsonl and TensorBoard events; does nothing on processes that do not write.

    Args:
      size: bytes of metrics.jsonl up to which a continued run was saved; what it wrote afterwards is dropped, since it comes
        again. None begins anew.
      step: of the checkpoint; TensorBoard hides what comes after it.
    """

    def __init__(self, workdir: pathlib.Path, write: bool, size: int | None = None, step: int = 0):
        self._lines = self._events = None
        if not write:
            return
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        if size is None:
            for old in (*workdir.glob("events.out.*"), path):
                old.unlink(missing_ok=True)
        elif path.exists() and path.stat().st_size > size:
            os.truncate(path, size)
        self._lines = path.open("a")
        self._events = SummaryWriter(str(workdir), flush_secs=10, purge_step=None if size is None else step + 1)

    def size(self) -> int:
        """Bytes of metrics.jsonl, all of them on disk."""
        if self._lines is None:
            return 0
        os.fsync(self._lines.fileno())
        return self._lines.tell()

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line; scalars also go to TensorBoard as `kind/name`."""
        if self._lines is None or self._events is None:
            return
        self._lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if isinstance(value, float):
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def write_seconds(self, step: int, foreground: Mapping[str, float], background: Mapping[str, float]) -> None:
        """Seconds by phase so far, of the loop and of the buffer's writer; to TensorBoard alone, as metrics.jsonl holds what
        a repeated run has again."""
        if self._events is not None:
            for kind, seconds in (("foreground", foreground), ("background", background)):
                for name, value in seconds.items():
                    self._events.add_scalar(f"seconds_{kind}/{name}", value, step)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """What was written of this kind so far, an interrupted session's part included; [] on processes that do not write."""
        if self._lines is None:
            return []
        found = map(json.loads, pathlib.Path(self._lines.name).read_text().splitlines())
        return [{name: x for name, x in line.items() if name != "kind"} for line in found if line["kind"] == kind]

    def close(self) -> None:
        if self._lines is not None and self._events is not None:
            self._lines.close()
            with contextlib.suppress(OSError):  # on a full disk: what ended the run has been said
                self._events.close()
