"""What result.json says of a run over tasks."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxcl import summaries
from jaxcl.buffer import Buffer
from jaxcl.data import Loader
from jaxcl.runs.frame import conditions
from jaxcl.runs.session import Progress
from jaxcl.training.batches import draws_per_epoch
from jaxcl.training.build import Parts
from jaxcl.training.large_batch import epochs_of
from jaxcl.training.sizes import bytes_of
from jaxcl.training.state import TrainState

MEASURES = ("accuracy", "error")  # of classification, of reconstruction
NAMED = ("accuracy", "top5", "error")  # scores that have summaries of their own
ONLY_LAST = ("accuracy_in_task", "confusion")  # scores that are told of the last weights alone


def add_scores(at: Progress, scores: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Adds the scores of all tasks `[T]`, as they are after this one, to the progress; those that it keeps."""
    rows: dict[str, list[float]] = {name: x.tolist() for name, x in scores.items() if name not in ONLY_LAST}
    for name, row in rows.items():
        at.scores.setdefault(name, []).append(row)
    return rows


def count_rows(config: ConfigDict, parts: Parts, at: Progress, state: TrainState, loader: Loader) -> None:
    """Adds to the progress what a task has trained on, `state` being the one in which its steps end."""
    at.counts["images"] = at.counts.get("images", 0) + epochs_of(config) * loader.rows_per_epoch
    if parts.buffer is not None and state.buffer is not None:
        stored = parts.buffer.stats(state.buffer)["rows_per_shard"]
        drawn = draws_per_epoch(config, parts.buffer, stored, loader.steps_per_epoch)
        at.counts.setdefault("replayed", []).append(drawn)


def count_review(at: Progress, loader: Loader) -> None:
    """Adds to the progress the rows of an epoch of the fine-tuning that is done."""
    at.counts.setdefault("tuned", []).append(loader.rows_per_epoch)


def summarize(
    config: ConfigDict, parts: Parts, at: Progress, state: TrainState, scores: dict[str, np.ndarray], untrained: Any
) -> dict[str, Any]:
    """What result.json says of a run but for its times."""
    return {
        "name": config.name,
        "strategy": config.strategy,
        "seed": config.seed,
        "source": config.data.source,
        "model": config.model.name,
        "class_names": list(parts.train.class_names),
        "tasks": [list(task.classes) for task in parts.scenario.tasks],
        "evaluated_on": "validation" if config.data.validation else "test",
        **(_errors(at, untrained) if parts.train.targets else _accuracies(parts, at, scores, untrained)),
        **_further(at),
        "steps": at.step,
        "images": at.counts["images"],
        "buffer": _buffer_report(parts.buffer, state),
        "strategy_bytes": bytes_of(state.strategy_state),
        "prior": parts.prior,
        **parts.network.report(),
        "replay": None if parts.buffer is None else _replay_report(config, at),
        **conditions(config, parts.mesh),
    }


def _accuracies(parts: Parts, at: Progress, scores: dict[str, np.ndarray], untrained: Any) -> dict[str, Any]:
    """Of classification: the matrix and its summaries, and what is told of the last weights alone."""
    matrix, confusion = at.scores["accuracy"], scores["confusion"]
    found = {"accuracy_matrix": matrix, **summaries.summarize(matrix)}
    if parts.train.num_classes > 5:  # else top-5 accuracy says nothing
        top5 = at.scores["top5"]
        found |= {"top5_matrix": top5, "average_top5": summaries.average_accuracy(top5)}
        found |= {"top5_so_far": summaries.accuracy_so_far(top5).tolist()}
    found |= {"forward_transfer": summaries.forward_transfer(matrix, untrained)}
    found |= {"accuracy_in_task": scores["accuracy_in_task"].tolist()}
    found |= {"per_class_accuracy": summaries.per_class_accuracy(confusion)}
    return found | ({"confusion": confusion.tolist()} if len(confusion) <= 100 else {})  # where it stays readable


def _further(at: Progress) -> dict[str, Any]:
    """Of every further metric the matrix, and the mean over tasks after the last."""
    more = {name: rows for name, rows in at.scores.items() if name not in NAMED}
    matrices = {f"{name}_matrix": rows for name, rows in more.items()}
    return matrices | {f"average_{name}": summaries.average_accuracy(rows) for name, rows in more.items()}


def _errors(at: Progress, untrained: Any) -> dict[str, Any]:
    return {
        "error_matrix": at.scores["error"],
        **summaries.summarize_errors(at.scores["error"]),
        "untrained_error": untrained.tolist(),
    }


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
