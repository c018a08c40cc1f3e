"""What a run leaves in its folder: config.json, metrics.jsonl, TensorBoard events, result.json."""

import json
import os
import pathlib
import shutil
from typing import Any

from ml_collections import ConfigDict

from jaxcl.errors import UserError


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON gives it back: plain dicts, lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


def claim(workdir: pathlib.Path, config: ConfigDict) -> dict[str, Any] | None:
    """Takes `workdir` for a run of `config`.

    Returns:
      The result of a finished run of the same config, else None; the folder then holds config.json and no older logs.

    Raises:
      UserError: the folder holds another config's run, or cannot be written.
    """
    mine, path = resolved(config), workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            theirs = json.loads(path.read_text())
            difference = _difference(theirs, mine)
            if difference:
                raise UserError(f"workdir: {workdir} holds another config's run ({difference}); give another folder")
            result = workdir / "result.json"
            if result.exists():
                return json.loads(result.read_text())
        for old in (*workdir.glob("events.out.*"), workdir / "metrics.jsonl"):
            old.unlink(missing_ok=True)
        write_json(path, mine)
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


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes whole or not at all, whenever the process is killed."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _difference(theirs: Any, mine: Any, path: str = "config") -> str | None:
    """The first field in which two resolved configs differ, in words; None if they are equal."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for name in sorted({*theirs, *mine}):
            found = _difference(theirs.get(name), mine.get(name), f"{path}.{name}")
            if found:
                return found
        return None
    return None if theirs == mine else f"{path} is {theirs!r} there, {mine!r} here"


class Log:
    """metrics.jsonl and TensorBoard events; does nothing on processes that do not write."""

    def __init__(self, workdir: pathlib.Path, write: bool):
        self._lines = self._events = None
        if write:
            from tensorboardX import SummaryWriter

            self._lines = (workdir / "metrics.jsonl").open("a")
            self._events = SummaryWriter(str(workdir), flush_secs=10)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line; scalars also go to TensorBoard as `kind/name`."""
        if self._lines is None or self._events is None:
            return
        self._lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if isinstance(value, float):
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        if self._lines is not None and self._events is not None:
            self._lines.close()
            self._events.close()
