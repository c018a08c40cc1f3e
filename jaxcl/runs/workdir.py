"""What a run leaves in its folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/, result.json.

The config lies in config.json, in every checkpoint and in result.json, and is compared with each of them that is there.
"""

import contextlib
import fcntl
import json
import logging
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import jaxcl
from jaxcl.errors import UserError
from jaxcl.runs import checkpoint, files, log

# Fields that a run may change when it continues, because its result does not depend on them.
FREE = ("config.checkpoint", "config.data.threads")
CONFIG, RESULT, CHECKPOINTS = "config.json", "result.json", "checkpoints"
_log = logging.getLogger("jaxcl")


class Claim(NamedTuple):
    """Where a run stands.

    Attributes:
      finished: what result.json holds; None if the run is not finished.
      found: the manifest of the checkpoint to continue from; None for a run that begins or is finished.
    """

    finished: dict[str, Any] | None
    found: dict[str, Any] | None


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON gives it back: plain dicts, lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds `workdir`, made if needed, against other runs. The lock goes with the process, however it ends.

    Raises:
      UserError: another process holds it, or it cannot be written.
    """
    with _usable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"workdir: {workdir} is in use by another run; wait for it or give another folder"
            ) from error
        yield


def claim(workdir: pathlib.Path, config: ConfigDict, overwrite: bool = False) -> Claim:
    """Takes `workdir`, which must be `locked`, for a run of `config`; an unfinished one has config.json and its log then.

    Raises:
      UserError: the folder holds another config's or another version's run, what it holds is damaged and cannot be made
        anew, or it cannot be written.
    """
    with _usable(workdir):
        _check_names(workdir)
        if overwrite:
            clear(workdir)
        _check_config(workdir, config)
        damage = None
        if (workdir / RESULT).exists():
            try:
                result = files.read_sealed(workdir / RESULT)
                _check_run(workdir, result.get("config", {}), config)
                return Claim(result, None)
            except files.Damaged as error:
                damage = error
        found = checkpoint.newest(workdir / CHECKPOINTS)
        if found is not None:
            _check_version(workdir, found.get("version"))
            _check_run(workdir, found["config"], config)
        if damage is not None:
            if found is None:
                raise UserError(
                    f"workdir: {damage}, and there is no checkpoint to make it anew; remove it to train again, "
                    "or give another folder"
                )
            _log.warning("%s: made anew from checkpoint %s", damage, found["name"])
        files.write_json(workdir / CONFIG, {"jaxcl": jaxcl.__version__, **resolved(config)})
        log.restore(workdir, found["run"]["log"] if found else None)
        return Claim(None, found)


def clear(workdir: pathlib.Path) -> None:
    """Removes a run, and nothing else, from `workdir`."""
    for name in (CONFIG, RESULT, log.NAME):
        (workdir / name).unlink(missing_ok=True)
    for events in workdir.glob("events.out.*"):
        events.unlink()
    shutil.rmtree(workdir / CHECKPOINTS, ignore_errors=True)


def _check_names(workdir: pathlib.Path) -> None:
    for name in (CONFIG, RESULT, log.NAME):
        if (workdir / name).is_dir():
            raise UserError(f"workdir: {workdir / name} is a folder; remove it or give another workdir")
    folder = workdir / CHECKPOINTS
    if folder.exists() and not folder.is_dir():
        raise UserError(f"workdir: {folder} is not a folder; remove it or give another workdir")


def _check_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Compares config.json, if it is there."""
    path = workdir / CONFIG
    if not path.exists():
        return
    try:
        theirs = files.read_json(path)
        if not {"name", "seed", "checkpoint"} <= theirs.keys():
            raise files.Damaged(f"{path} is damaged: it holds no config of a run")
    except files.Damaged as error:
        raise UserError(
            f"workdir: {error}; remove it to continue (the checkpoints hold the config too), or give another folder"
        ) from error
    _check_version(workdir, theirs.pop("jaxcl", None))
    _check_run(workdir, theirs, config)


def _check_version(workdir: pathlib.Path, version: str | None) -> None:
    """Runs go on with the minor version that began them; before 0.2.0 none was written down."""
    theirs, mine = version or "0.1.0", jaxcl.__version__
    if theirs.split(".")[:2] != mine.split(".")[:2]:
        raise UserError(
            f"workdir: {workdir} was written by jaxcl {theirs}; this is {mine}; continue it with {theirs} "
            "or give another folder"
        )


def _check_run(workdir: pathlib.Path, theirs: dict[str, Any], config: ConfigDict) -> None:
    check_same(theirs, config, f"workdir: {workdir} holds another config's run", "; give another folder")


@contextlib.contextmanager
def _usable(workdir: pathlib.Path) -> Iterator[None]:
    """Within, an OSError becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"workdir: {workdir} cannot be used: {error}") from error


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
