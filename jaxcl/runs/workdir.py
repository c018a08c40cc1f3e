"""What a run leaves in its folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/, weights.safetensors,
result.json.

The config lies in config.json, in every checkpoint and in result.json, and is compared with each of them that is there.

A folder is ours by its mark, which is made in a new or empty one alone. What else lies in it is left as it is, whatever happens
to the run: of these names those in `checkpoints/` that `checkpoint` did not make, and of the events those without our ending.
"""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import jaxcl
from jaxcl.errors import UserError
from jaxcl.registry import short
from jaxcl.runs import checkpoint, files, log
from jaxcl.runs.code import Code, changed_modules, code_of
from jaxcl.runs.writers import csv
from jaxcl.runs.writers.tensorboard import EVENTS
from jaxcl.sealed import Damaged, read_json, read_sealed

# Fields that a run may change when it continues, because its result does not depend on them, or by rounding alone.
FREE = (
    "config.checkpoint",
    "config.data.threads",
    "config.data.workers",
    "config.latent.cache",
    "config.writers",
    "config.mesh",
    "config.microbatches",
    "config.optimizer.split_state",
)
# Fields that are filled in as a run begins: where this config leaves one open it is not compared.
FILLED_IN = ("config.model.init_digest",)
MARK, CONFIG, RESULT, CHECKPOINTS = ".jaxcl", "config.json", "result.json", "checkpoints"
WEIGHTS = "weights.safetensors"
_REMEDY = "bring them back to continue, train from the start with --overwrite, or give another folder"
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
    """Marks `workdir`, made if needed, as the folder of a run, and holds it against others. The lock goes with the process,
    however it ends.

    Raises:
      UserError: it holds other things than a run, another process holds it, or it cannot be written.
    """
    with _usable(workdir):
        _check_ours(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        mark = os.open(workdir / MARK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with open(mark, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"workdir: {workdir} is in use by another run; wait for it or give another folder"
            ) from error
        with _usable(workdir):
            if not file.read():
                file.write(f"a run of jaxcl {jaxcl.__version__}\n")
                file.flush()
        yield


def finished(workdir: pathlib.Path, config: ConfigDict) -> dict[str, Any] | None:
    """What result.json holds if the run of `config` is finished and whole, else None; that it is one of other code is said.
    Nothing is written: a finished run may lie on a file system that cannot be. No lock is needed, as the file is whole or not
    there.

    Raises:
      UserError: the folder holds other things than a run, or another config's, another version's or other code's.
    """
    with _usable(workdir):
        _check_ours(workdir)
        _check_config(workdir, config)
        result = _result(workdir, config)[0]
        if result is not None:
            _say_code(workdir, result.get("code"), config, "returned as it is; --overwrite trains anew")
        return result


def standing(workdir: pathlib.Path, config: ConfigDict) -> Claim:
    """What `claim` would answer; changes nothing and says nothing.

    Raises:
      UserError: as `claim`.
    """
    with _usable(workdir):
        _check_ours(workdir)
        return _look(workdir, config)[0]


def claim(workdir: pathlib.Path, config: ConfigDict, overwrite: bool = False) -> Claim:
    """Takes `workdir`, which must be `locked`, for a run of `config`; an unfinished one has config.json and its log then.

    Raises:
      UserError: the folder holds another config's, another version's or other code's run, what it holds is damaged and
        cannot be made anew, its checkpoints are gone, or it cannot be written.
    """
    with _usable(workdir):
        _check_names(workdir)
        if overwrite:
            clear(workdir)
        stands, survey, damage = _look(workdir, config)
        if stands.finished is not None:
            return stands
        checkpoint.tidy(survey)
        if stands.found is not None and damage is not None:
            _log.warning("%s: made anew from checkpoint %s", damage, stands.found["name"])
        if stands.found is not None:
            _say_code(workdir, stands.found.get("code"), config, "continued by this; --overwrite begins anew")
        (workdir / CHECKPOINTS).mkdir(exist_ok=True)  # before config.json: see _look
        files.write_json(workdir / CONFIG, {"jaxcl": jaxcl.__version__, **resolved(config)})
        log.restore(workdir, stands.found["run"]["log"] if stands.found else None)
        return stands


def clear(workdir: pathlib.Path) -> None:
    """Removes a run, and nothing else, from `workdir`."""
    for name in (CONFIG, RESULT, WEIGHTS, log.NAME, log.ASIDE):
        (workdir / name).unlink(missing_ok=True)
    for events in workdir.glob(EVENTS):
        events.unlink()
    scalars = workdir / csv.NAME
    if scalars.is_file() and csv.is_ours(scalars):
        scalars.unlink()
    checkpoint.clear(workdir / CHECKPOINTS)


def _look(workdir: pathlib.Path, config: ConfigDict) -> tuple[Claim, checkpoint.Survey, Damaged | None]:
    """Where the run stands, what lies among its checkpoints, and what is wrong with result.json."""
    begun = _check_config(workdir, config)
    result, damage = _result(workdir, config)
    if result is not None:
        return Claim(result, None), checkpoint.Survey(None, {}, [], []), None
    folder = workdir / CHECKPOINTS
    survey = checkpoint.survey(folder)
    if survey.newest is not None:
        _check_version(workdir, survey.newest.get("version"))
        _check_run(workdir, survey.newest["config"], config)
        _check_code(workdir, survey.newest.get("code"), config, "begun")
    elif damage is not None:
        raise UserError(f"workdir: {damage}, and there is no checkpoint to make it anew; {_REMEDY}")
    elif begun and not folder.exists():  # it is made before config.json
        raise UserError(f"workdir: the checkpoints of the run, {folder}, are gone; {_REMEDY}")
    return Claim(None, survey.newest), survey, damage


def _check_ours(workdir: pathlib.Path) -> None:
    """Whether the folder has the mark of a run, or config.json of one from before there were marks, or is empty but for
    hidden files. What 0.1.0 left, whose config.json has no version, is told from what others did by its checkpoints' fields."""
    there = sorted(path.name for path in workdir.iterdir() if path.name[0] != ".") if workdir.exists() else []
    if not there or (workdir / MARK).is_file():
        return
    with contextlib.suppress(Damaged):
        found = read_json(workdir / CONFIG)
        if "jaxcl" in found:
            return
        if isinstance(found.get("checkpoint"), dict) and "keep" in found["checkpoint"]:
            _check_version(workdir, None)
    raise UserError(f"workdir: {workdir} holds {there[0]} and no run; give a new or an empty folder")


def _check_names(workdir: pathlib.Path) -> None:
    for name in (CONFIG, RESULT, WEIGHTS, log.NAME, log.ASIDE, CHECKPOINTS):
        path = workdir / name
        if path.is_symlink():  # what it leads to is not ours to change
            raise UserError(f"workdir: {path} is a symbolic link; remove it or give another workdir")
        if name != CHECKPOINTS and path.is_dir():
            raise UserError(f"workdir: {path} is a folder; remove it or give another workdir")
    if path.exists() and not path.is_dir():
        raise UserError(f"workdir: {path} is not a folder; remove it or give another workdir")


def _check_config(workdir: pathlib.Path, config: ConfigDict) -> bool:
    """Compares config.json, if it is there, and says whether it is."""
    path = workdir / CONFIG
    if not path.exists():
        return False
    try:
        theirs = read_json(path)
        if not {"name", "seed", "checkpoint"} <= theirs.keys():
            raise Damaged(f"{path} is damaged: it holds no config of a run")
    except Damaged as error:
        raise UserError(
            f"workdir: {error}; remove it to continue (the checkpoints hold the config too), or give another folder"
        ) from error
    _check_version(workdir, theirs.pop("jaxcl", None))
    _check_run(workdir, theirs, config)
    return True


def _result(workdir: pathlib.Path, config: ConfigDict) -> tuple[dict[str, Any] | None, Damaged | None]:
    """What result.json holds, if it is there, or what is wrong with it."""
    if not (workdir / RESULT).exists():
        return None, None
    try:
        result = read_sealed(workdir / RESULT)
    except Damaged as error:
        return None, error
    _check_run(workdir, result.get("config", {}), config)
    _check_code(workdir, result.get("code"), config, "trained")
    return result, None


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


def _check_code(workdir: pathlib.Path, theirs: Code | None, config: ConfigDict, done: str) -> None:
    """The user's modules are part of the experiment, as the config is; what of jaxcl may change is the business of versions."""
    changed = "" if theirs is None else changed_modules(theirs, code_of(config))
    if changed and not config.checkpoint.get("accept_other_code", False):
        raise UserError(
            f"workdir: {workdir} was {done} with other code ({changed}); train anew with --overwrite, go on with "
            "--config.checkpoint.accept_other_code=True, or give another folder"
        )


def _say_code(workdir: pathlib.Path, theirs: Code | None, config: ConfigDict, then: str) -> None:
    """One line where a run, which was not refused, is of other code than would make it now, or does not tell."""
    mine = code_of(config)
    if theirs is None:
        _log.warning("%s: does not tell by what code it was made; %s", workdir, then)
        return
    said = [changed] if (changed := changed_modules(theirs, mine)) else []
    if theirs["digest"] != mine["digest"]:
        said.append(
            "jaxcl {jaxcl} of source {digest} there".format(**theirs) + ", {jaxcl} of {digest} here".format(**mine)
        )
    if said:
        _log.warning("%s: made by other code (%s); %s", workdir, "; ".join(said), then)


@contextlib.contextmanager
def _usable(workdir: pathlib.Path) -> Iterator[None]:
    """Within, an OSError becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"workdir: {workdir} cannot be used: {error}") from error


def check_same(theirs: dict[str, Any], config: ConfigDict, problem: str, advice: str = "") -> None:
    """Compares a resolved config with this one, but for the fields that a run may change and those it does not use.

    Raises:
      UserError: they differ; `problem`, the first field that does, `advice`.
    """
    mine = resolved(config)
    own = {short(str(one.get("strategy"))) for one in (theirs, mine)}
    difference = _difference(_used(theirs, own), _used(mine, own))
    if difference:
        raise UserError(f"{problem} ({difference}){advice}")


def _used(config: dict[str, Any], own: set[str]) -> dict[str, Any]:
    """A resolved config with the options of these strategies alone: those of others come and go with their files."""
    options = config.get("strategies")
    if not isinstance(options, dict):
        return config
    return config | {"strategies": {name: given for name, given in options.items() if name in own}}


def _difference(theirs: Any, mine: Any, path: str = "config") -> str | None:
    """The first field in which two resolved configs differ, in words; None if they are equal."""
    if path in FREE or (path in FILLED_IN and mine is None):
        return None
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for name in sorted({*theirs, *mine}):
            found = _difference(theirs.get(name), mine.get(name), f"{path}.{name}")
            if found:
                return found
        return None
    return None if theirs == mine else f"{path} is {theirs!r} there, {mine!r} here"
