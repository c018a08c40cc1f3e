"""Several seeds of one config in one program: the steps and the evaluations of all are made as one, by `vmap`.

A small model leaves most of a device idle, and a step of it costs more to start than to compute; n seeds side by side cost
far less than n times one. The seeds share nothing: each has its own weights, order of rows, buffer and random numbers, and
leaves its own folder, as if run alone, equal to rounding. What ends a task runs seed after seed.

Beyond that a folder does not know of the others: it can be continued alone, and a run begun alone can be continued here.
Seeds go on together where they stand at the same step. Its times are those of the whole program, which `seeds_together` in
result.json tells.
"""

import pathlib
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxcl.check import SEED, check
from jaxcl.errors import UserError
from jaxcl.runs import workdir as workdir_lib
from jaxcl.runs.progress import Runs, Shown
from jaxcl.training import init_from, loop
from jaxcl.training.build import build, strategy_of
from jaxcl.training.config import check_config


def check_together(config: ConfigDict) -> None:
    """Checks what can be told without data.

    Raises:
      UserError: seeds of this config cannot be trained together.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"--vmap: not allowed in a run of {jax.process_count()} processes, which train one seed at a time"
        )
    strategy = strategy_of(config)
    if strategy.rehearse:
        raise UserError(
            f"--vmap: not allowed with {config.strategy}, which trains new weights at a task's end; leave it out"
        )
    if config.mesh.fsdp * config.mesh.model > 1 or config.optimizer.split_state:
        raise UserError("--vmap: not allowed where devices have parts of the weights; leave it out")
    if strategy.draws and config.buffer.tier == "host":
        raise UserError(
            "--vmap: not allowed with buffer.tier = host, whose rows belong to one seed; give tier = device"
        )


def check_seeds(config: ConfigDict, seeds: Sequence[int], together: bool, devices: int) -> None:
    """Checks what can be told of the runs of these seeds without data.

    Raises:
      UserError: their config is not allowed on `devices` devices, one of them is no seed, or see `check_together`.
    """
    check_config(config, devices)
    for seed in seeds:
        check("seed", seed, SEED)
    if together:
        check_together(config)


def check_folders(config: ConfigDict, folders: dict[int, pathlib.Path], overwrite: bool) -> None:
    """Checks that the runs can be begun or continued in their folders, before hours are spent on others; changes nothing.

    Raises:
      UserError: a folder holds something else, see `workdir.standing`. Without effect if it is to be overwritten.
    """
    if overwrite or jax.process_index() > 0:  # the first process alone claims a folder
        return
    for seed, folder in folders.items():
        workdir_lib.standing(folder, with_seed(config, seed))


def train_seeds(
    config: ConfigDict,
    folders: dict[int, pathlib.Path],
    *,
    together: bool = True,
    devices: Sequence[jax.Device] | None = None,
    progress: Shown = True,
    overwrite: bool = False,
    start_seconds: float | None = None,
    stall_seconds: float | None = None,
) -> list[dict[str, Any]]:
    """As `train_and_evaluate` for each seed, as one program or, without `together`, one after the other.

    Arguments and errors that are not named here are those of `train_and_evaluate`; what befalls one seed ends all.

    Args:
      config: of all runs but for its seed.
      folders: seed -> the folder of its run.

    Returns:
      What each result.json holds, in the order of `folders`.
    """
    config = init_from.bound(config)
    if together:
        check_together(config)
    for seed in folders:
        check("seed", seed, SEED)
    limits: Any = {"start_seconds": start_seconds, "stall_seconds": stall_seconds}
    options: Any = {"devices": devices, "progress": progress, **limits}
    groups: dict[str | None, list[int]] = defaultdict(list)
    found: dict[int, dict[str, Any]] = {}
    for seed, folder in folders.items():
        finished, standing = _standing(with_seed(config, seed), folder, overwrite) if together else (None, None)
        if finished is None:
            groups[standing].append(seed)
        else:
            found[seed] = finished
            if isinstance(progress, Runs):
                progress.next(1)
    for standing, seeds in groups.items():
        configs = {seed: with_seed(config, seed) for seed in seeds}
        if standing is None or len(seeds) == 1:  # none to go with
            for seed, one in configs.items():
                found[seed] = loop.train_and_evaluate(one, folders[seed], overwrite=overwrite, **options)
        else:
            begin = time.perf_counter()
            parts = build(configs[seeds[0]], devices, seeds)
            where = [folders[seed] for seed in seeds]
            lanes: Any = {"begin": begin, "progress": progress, "overwrite": overwrite, **limits}
            found |= zip(seeds, loop.train_lanes(list(configs.values()), where, parts, **lanes), strict=True)
    return [found[seed] for seed in folders]


def with_seed(config: ConfigDict, seed: int) -> ConfigDict:
    one = config.copy_and_resolve_references()
    one.seed = seed
    return one


def _standing(config: ConfigDict, folder: pathlib.Path, overwrite: bool) -> tuple[dict[str, Any] | None, str]:
    """The result of a finished run, for which no data are opened; the name of the checkpoint from which another goes on, ""
    at its start."""
    if overwrite:
        return None, ""
    finished, found = workdir_lib.standing(folder, config)
    return finished, found["name"] if found else ""
