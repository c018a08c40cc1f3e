"""Weights & Biases, offline: DIR/wandb, sent later by `wandb sync DIR/wandb/offline-run-*`. `WANDB_MODE=online` sends at once.

Needs the package wandb.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxcl.runs.writers.base import Setting, Writer


def wandb(folder: pathlib.Path, settings: Mapping[str, Setting], step: int | None) -> Writer:
    """A continued run keeps its id, so that a sync joins its sessions; the steps after `step` are not taken twice."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nothing leaves the machine unless it is asked for
    import wandb as client

    before = sorted(folder.glob("wandb/*run-*-*")) if step is not None else []
    run = client.init(
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        dir=str(folder),
        project=os.environ.get("WANDB_PROJECT", "jaxcl"),
        name=f"{settings.get('name', 'run')}-{settings.get('strategy', '')}-{settings.get('seed', 0)}",
        id=before[-1].name.rpartition("-")[2] if before else None,
        resume="allow",
        config=dict(settings),
        settings=client.Settings(silent=True, console="off"),
    )
    return _Run(client, run)


class _Run:
    def __init__(self, client: Any, run: Any) -> None:
        self._client, self._run = client, run

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()
        self._client.teardown()  # its service is a process, which would outlive a command
