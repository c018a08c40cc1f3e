"""The frame of a run: its sessions are opened, it is carried out, and result.json is left."""

import contextlib
import datetime
import importlib.metadata
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

import jaxcl
from jaxcl import compilation
from jaxcl.check import NOT_NEGATIVE, check
from jaxcl.runs import files, workdir
from jaxcl.runs.origin import command, commit
from jaxcl.runs.session import Session, open_session
from jaxcl.runs.steps import STEPPING
from jaxcl.sealed import sealed

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def in_sessions(
    configs: Sequence[ConfigDict],
    folders: Sequence[pathlib.Path],
    mesh: jax.sharding.Mesh,
    carry_out: Callable[[Sequence[Session]], list[dict[str, Any]]],
    *,
    begin: float,
    overwrite: bool = False,
    start_seconds: float | None = None,
    stall_seconds: float | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Carries out runs in sessions of their folders, and leaves result.json in each.

    Args:
      configs, folders: of runs that go side by side, of which none is finished; or of one, which if it is finished is
        returned as it is.
      carry_out: trains, and says of each run what result.json holds but for its times.
      begin: `time.perf_counter()` at the beginning of the run.
      overwrite, start_seconds, stall_seconds, manifest: see `open_session`.

    Returns:
      What each result.json holds.
    """
    if stall_seconds is not None:
        check("stall_seconds", stall_seconds, NOT_NEGATIVE)
    with contextlib.ExitStack() as stack:
        sessions: list[Session] = []
        before = compilation.spent()
        for config, folder in zip(configs, folders, strict=True):
            stack.enter_context(files.full_disk_is_a_storage_error(folder))
            options: Any = {"begin": begin, "overwrite": overwrite}
            options |= {"start_seconds": start_seconds, "stall_seconds": stall_seconds, "manifest": manifest}
            session = open_session(stack, config, folder, mesh, **options)
            if isinstance(session, dict):
                assert len(configs) == 1, "a finished run is not continued"
                return [session]
            sessions.append(session)
        found = carry_out(sessions)
        compiled = {"compilation": compilation.spent(before)}  # of this session, and of all runs that went side by side
        results = [
            sealed(result | times(result["images"], session) | made_by(session) | compiled)
            for session, result in zip(sessions, found, strict=True)
        ]
        if jax.process_index() == 0:
            for folder, result in zip(folders, results, strict=True):
                files.write_json(folder / workdir.RESULT, result)
    return results


def times(images: int, session: Session) -> dict[str, Any]:
    """What result.json says of a run's times; `finished` in UTC."""
    seconds, by_phase = session.seconds(), session.phases.seconds
    return {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds"),
        "seconds": seconds,
        "images_per_second": images / max(sum(by_phase.get(name, 0.0) for name in STEPPING), 1e-9),
        "seconds_by_phase": {**by_phase, "other": seconds - sum(by_phase.values())},
    }


def made_by(session: Session) -> dict[str, Any]:
    """What result.json says of the code; also what came before where a run was continued by other code."""
    *before, code = session.progress.codes
    return {"code": code} | ({"earlier_code": before} if before else {})


def conditions(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Under which a run was made, for result.json: command, commit, devices, versions, the resolved config."""
    return {
        "command": command(),
        "commit": commit(),
        "devices": {
            "count": mesh.size,
            "mesh": dict(mesh.shape),
            "kind": mesh.devices.flat[0].device_kind,
            "platform": mesh.devices.flat[0].platform,
            "processes": jax.process_count(),
        },
        "versions": {"jaxcl": jaxcl.__version__} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "config": workdir.resolved(config),
    }
