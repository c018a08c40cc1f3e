"""What result.json says of a run, and the frame in which runs leave it."""

import contextlib
import importlib.metadata
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcl import metrics
from jaxcl.buffer import Buffer
from jaxcl.data import Loader
from jaxcl.runs import files, workdir
from jaxcl.runs.session import Progress, Session, open_session
from jaxcl.training.build import Experiment
from jaxcl.training.replay import draws_per_epoch
from jaxcl.training.state import TrainState

STEPPING = ("load", "assemble", "wait", "train", "accumulate")  # of the steps; wait and accumulate are the host tier's


def record(
    configs: Sequence[ConfigDict],
    folders: Sequence[pathlib.Path],
    mesh: jax.sharding.Mesh,
    run: Callable[[Sequence[Session]], list[dict[str, Any]]],
    *,
    begin: float,
    overwrite: bool = False,
    stall_seconds: float | None = None,
) -> list[dict[str, Any]]:
    """Runs in sessions of these folders, and leaves in each its result.json.

    Args:
      configs, folders: of runs that go side by side, of which none is finished; or of one, which if it is finished is
        returned as it is.
      run: trains, and says of each run what result.json holds but for its times.
      begin: `time.perf_counter()` at the beginning of the run.
      overwrite, stall_seconds: see `open_session`.

    Returns:
      What each result.json holds.
    """
    with contextlib.ExitStack() as stack:
        sessions: list[Session] = []
        for config, folder in zip(configs, folders, strict=True):
            stack.enter_context(files.full_disk_is_a_storage_error(folder))
            options: Any = {"begin": begin, "overwrite": overwrite, "stall_seconds": stall_seconds}
            session = stack.enter_context(open_session(config, folder, mesh, **options))
            if isinstance(session, dict):
                assert len(configs) == 1, "a finished run is not continued"
                return [session]
            sessions.append(session)
        results = run(sessions)
        results = [
            files.sealed(result | times(result["images"], session))
            for session, result in zip(sessions, results, strict=True)
        ]
        if jax.process_index() == 0:
            for folder, result in zip(folders, results, strict=True):
                workdir.finish(folder, result)
    return results


def times(images: int, session: Session) -> dict[str, Any]:
    """What result.json says of a run's times."""
    seconds, by_phase = session.seconds(), session.phases.seconds
    return {
        "seconds": seconds,
        "images_per_second": images / max(sum(by_phase.get(name, 0.0) for name in STEPPING), 1e-9),
        "seconds_by_phase": {**by_phase, "other": seconds - sum(by_phase.values())},
    }


def add_scores(at: Progress, scores: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Adds the scores of all tasks, as they are after this one, to the progress."""
    rows: dict[str, list[float]] = {
        name: scores[name].tolist() for name in ("accuracy", "top5", "error") if name in scores
    }
    for name, row in rows.items():
        at.scores[name].append(row)
    return rows


def count_rows(config: ConfigDict, run: Experiment, at: Progress, state: TrainState, loader: Loader, task: int) -> None:
    """Adds to the progress what a task has trained on, `state` being the one in which its steps end."""
    at.counts["images"] = at.counts.get("images", 0) + config.epochs * loader.rows_per_epoch
    if run.buffer is not None and state.buffer is not None:
        stored = run.buffer.stats(state.buffer)["rows_per_shard"]
        at.counts.setdefault("replayed", []).append(draws_per_epoch(config, run.buffer, stored, loader.steps_per_epoch))


def summarize(
    config: ConfigDict, run: Experiment, at: Progress, state: TrainState, scores: dict[str, np.ndarray], untrained: Any
) -> dict[str, Any]:
    """What result.json says of a run but for its times."""
    return {
        "name": config.name,
        "strategy": config.strategy,
        "seed": config.seed,
        "source": config.data.source,
        "model": config.model.name,
        "tasks": [list(task.classes) for task in run.scenario.tasks],
        "evaluated_on": "validation" if config.data.validation else "test",
        **(_errors(at, untrained) if run.train.targets else _accuracies(run, at, scores, untrained)),
        "steps": at.step,
        "images": at.counts["images"],
        "buffer": _buffer_report(run.buffer, state),
        "replay": None if run.buffer is None else _replay_report(config, at),
        **conditions(config, run.mesh),
    }


def conditions(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Under which a run was made, for result.json: devices, versions, the resolved config."""
    return {
        "devices": {
            "count": mesh.size,
            "kind": mesh.devices.flat[0].device_kind,
            "platform": mesh.devices.flat[0].platform,
            "processes": jax.process_count(),
        },
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "config": workdir.resolved(config),
    }


def _accuracies(run: Experiment, at: Progress, scores: dict[str, np.ndarray], untrained: Any) -> dict[str, Any]:
    return {
        "accuracy_matrix": at.scores["accuracy"],
        **metrics.summarize(at.scores["accuracy"]),
        **_top5(at.scores["top5"], run.train.num_classes),
        "forward_transfer": metrics.forward_transfer(at.scores["accuracy"], untrained),
        **_last(scores),
    }


def _errors(at: Progress, untrained: Any) -> dict[str, Any]:
    return {
        "error_matrix": at.scores["error"],
        **metrics.summarize_errors(at.scores["error"]),
        "untrained_error": untrained.tolist(),
    }


def _last(scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is told of the last weights beside the matrix; the confusion matrix where it stays readable."""
    confusion = scores["confusion"]
    kept = {"confusion": confusion.tolist()} if len(confusion) <= 100 else {}
    in_task = scores["accuracy_in_task"].tolist()
    return {"accuracy_in_task": in_task, "per_class_accuracy": metrics.per_class_accuracy(confusion), **kept}


def _top5(matrix: list[list[float]], num_classes: int) -> dict[str, Any]:
    """Top-5 accuracy says something only above five classes."""
    if num_classes <= 5:
        return {}
    so_far = metrics.accuracy_so_far(matrix).tolist()
    return {"top5_matrix": matrix, "average_top5": metrics.average_accuracy(matrix), "top5_so_far": so_far}


def _replay_report(config: ConfigDict, at: Progress) -> dict[str, Any]:
    """Rows that an epoch of each task replays, and one of each fine-tuning, from the second task on, passes over."""
    tuned = {"finetune_rows_per_epoch": at.counts.get("tuned", [])} if config.finetune.epochs else {}
    return {"form": config.buffer.replay, "draws_per_epoch": at.counts.get("replayed", []), **tuned}


def _buffer_report(buffer: Buffer | None, state: TrainState) -> dict[str, Any] | None:
    if buffer is None or state.buffer is None:
        return None
    return {
        "capacity": buffer.capacity,
        "bytes": buffer.num_bytes,
        "traffic": buffer.traffic,
        **buffer.stats(state.buffer),
    }
