"""Run folders that are made in a moment, for the tests of what may become of one: nothing is trained."""

import pathlib
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxcl.runs import checkpoint, files, log, workdir
from jaxcl.runs.code import code_of
from jaxcl.runs.session import Progress
from jaxcl.sealed import sealed


def config(**changes: Any) -> ConfigDict:
    return ConfigDict({"name": "x", "seed": 0, "rate": 0.1, "writers": (), "checkpoint": {"keep": 2}} | changes)


def claim(folder: pathlib.Path, overwrite: bool = False, **changes: Any) -> workdir.Claim:
    with workdir.locked(folder):
        return workdir.claim(folder, config(**changes), overwrite)


def begin(folder: pathlib.Path) -> pathlib.Path:
    """A run with three lines in its log, two of them from before its one checkpoint."""
    assert claim(folder) == workdir.Claim(None, None)
    lines = log.Log(folder, True)
    progress = Progress(step=2, task=1, iterator=None)
    for step in (1, 2):
        lines.write("train", step, {"loss": 1 / step})
    progress.scores["accuracy"] = [[0.5, 0.25]]
    progress.log = lines.saved()
    checkpoints = checkpoint.Checkpoints(
        folder / "checkpoints", 2, workdir.resolved(config()), {"code": code_of(config())}
    )
    checkpoints.save(progress.name, {"w": jnp.arange(3.0)}, progress.saved())
    checkpoints.close()
    lines.write("train", 3, {"loss": 0.1})
    lines.close()
    return folder


def finish(folder: pathlib.Path) -> pathlib.Path:
    """The same with a result."""
    result = {"config": workdir.resolved(config()), "steps": 2, "accuracy": 0.8125, "code": code_of(config())}
    files.write_json(folder / workdir.RESULT, sealed(result))
    return folder


def contents(folder: pathlib.Path) -> dict[str, bytes | None]:
    """Every file below `folder` by its name, with what it holds; None for a folder."""
    return {str(x.relative_to(folder)): x.read_bytes() if x.is_file() else None for x in folder.rglob("*")}
