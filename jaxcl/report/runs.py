"""Runs as they lie in folders: read, checked, grouped over seeds."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.errors import UserError
from jaxcl.sealed import Damaged, read_sealed

_ORDER = ("from_scratch", "incremental", "er")
_FREE = (
    "checkpoint.",
    "data.threads",
    "mesh.",
    "microbatches",
    "optimizer.split_state",
    "writers",
)  # no result depends on them: a run may change them when it continues
_DERIVED = {"rehearsal", "tasks"}  # facets that follow from others
_PER_RUN = {"seed", "name", "workdir"}  # config fields that do not make a different experiment


@dataclass(frozen=True)
class Measure:
    """What the matrix of a run holds.

    Attributes:
      name: in the keys of result.json and in titles.
      unit: appended to the heads of columns.
      scale: from the matrix to what is shown.
      digits: behind the point, in the table.
      full: what is shown of a perfect or worthless entry: the end of an axis; None: the data's own.
      forgets: what a curve does when a task is forgotten.
    """

    name: str
    unit: str
    scale: float
    digits: int
    full: float | None
    forgets: str


ACCURACY = Measure("accuracy", " %", 100, 2, 100, "falls")
ERROR = Measure("error", "", 1, 4, None, "rises")


@dataclass(frozen=True)
class Run:
    """One run found on disk.

    Attributes:
      path: its folder.
      result: the content of result.json; {} unless finished.
      problem: why there is no result, in one line; "" when finished.
    """

    path: Path
    result: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Group:
    """Finished runs of one strategy and configuration, one a seed.

    Attributes:
      label: the strategy, and what differs from other groups of it.
      results, paths: of each run, the content of result.json and the folder.
    """

    label: str
    strategy: str
    results: list[dict[str, Any]]
    paths: list[Path]

    def values(self, *keys: str) -> np.ndarray:
        """The number under `result[keys[0]][keys[1]]...`, seed by seed."""
        values: list[Any] = self.results
        for key in keys:
            values = [value[key] for value in values]
        return np.asarray(values, np.float64)

    @property
    def matrices(self) -> np.ndarray:
        """[seeds, T, T] accuracies in 0..1, or errors."""
        return self.values(f"{measure_of(self.results[0]).name}_matrix")


# Reading


def measure_of(result: dict[str, Any]) -> Measure:
    return ERROR if "error_matrix" in result else ACCURACY


def common_measure(groups: Sequence[Group]) -> Measure:
    """What all runs measure.

    Raises:
      UserError: not all measure the same.
    """
    found = {measure_of(result) for group in groups for result in group.results}
    if len(found) > 1:
        raise UserError("run folders: some runs measure accuracy, others error; give runs of one kind")
    return found.pop()


def _check(result: dict[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError for a result that the report cannot show."""
    measure = measure_of(result)
    key = f"{measure.name}_matrix"
    matrix = np.asarray(result[key], np.float64)
    tasks = len(result["tasks"])
    if tasks < 1 or matrix.shape != (tasks, tasks):
        raise ValueError(f"{key} has shape {matrix.shape}; allowed: {(tasks, tasks)}, the number of tasks")
    if not ((matrix >= 0) & (matrix <= (1 if measure is ACCURACY else np.inf))).all():
        raise ValueError(f"{key} has values outside {'0..1' if measure is ACCURACY else '0..'}")
    for key in ("strategy", "source", "model"):
        if not isinstance(result[key], str):
            raise ValueError(f"{key} is not a string")
    for key in ("seconds_by_phase", "devices", "versions", "config"):
        if not isinstance(result[key], dict):
            raise ValueError(f"{key} is not an object")
    averages = (f"average_{measure.name}", f"average_incremental_{measure.name}")
    numbers = [result[key] for key in ("seed", *averages, "seconds")]
    numbers += [result["images_per_second"], result["devices"]["count"], *result["seconds_by_phase"].values()]
    numbers += result.get("background_seconds", {}).values()
    numbers += [result["forgetting"][key] for key in ("chaudhry", "mammoth", "avalanche")]
    numbers += [result["backward_transfer"][key] for key in ("gem", "diaz_rodriguez")]
    numbers += [result["buffer"]["bytes"]] if result["buffer"] is not None else []
    numbers += [result["average_top5"]] if "average_top5" in result else []
    if not np.isfinite(np.asarray(numbers, np.float64)).all():
        raise ValueError("a number is not finite")


def _read(path: Path) -> Run:
    try:
        result = read_sealed(path / "result.json")
        _check(result)
    except Damaged as error:
        return Run(path, problem=str(error).removeprefix(f"{path}/"))
    except KeyError as error:
        return Run(path, problem=f"malformed result.json: no {error.args[0]!r}")
    except (ValueError, TypeError, AttributeError) as error:
        return Run(path, problem=f"malformed result.json: {' '.join(str(error).split())}")
    return Run(path, result)


def load_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Every run at or below the given folders, once each, sorted by folder.

    A folder with config.json but no result.json is an unfinished run, unless it lies inside or above another run (a
    checkpoint keeps a config too).

    Raises:
      UserError: for a path that is no folder, or when there is no run at all.
    """
    roots = [Path(path) for path in paths]
    for root in roots:
        if not root.is_dir():
            raise UserError(f"run folder: {str(root)!r} is not a folder; allowed: folders that hold runs")
    found = {file.parent.resolve(): file.parent for root in roots for file in sorted(root.rglob("result.json"))}
    runs = {place: _read(path) for place, path in found.items()}
    for file in sorted((file for root in roots for file in root.rglob("config.json")), key=lambda f: len(f.parts)):
        place = file.parent.resolve()
        if not any(place.is_relative_to(other) or other.is_relative_to(place) for other in runs):
            runs[place] = Run(file.parent, problem="unfinished: no result.json")
    if not runs:
        raise UserError(f"run folder: no run below {', '.join(map(str, roots))}; allowed: folders with a result.json")
    return [runs[place] for place in sorted(runs)]


# Grouping


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{key}" if prefix else key).items()}


def _facets(result: dict[str, Any]) -> dict[str, str]:
    """All that makes a run another experiment than its neighbour, by name."""
    config = {key: v for key, v in _flat(result["config"]).items() if not key.startswith(_FREE)}
    facets = {key: v for key, v in config.items() if key not in _PER_RUN and key.split(".")[-1] != "seed"}
    facets |= {"source": result["source"], "model": result["model"], "tasks": len(result["tasks"])}
    facets |= {"devices": result["devices"]["count"], "rehearsal": result["buffer"] is not None}
    return {key: json.dumps(value) if not isinstance(value, str) else value for key, value in facets.items()}


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Finished runs grouped over seeds; from_scratch, incremental and er first, then by name."""
    strategies: dict[str, dict[tuple, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if not run.problem:
            strategies[run.result["strategy"]][tuple(sorted(_facets(run.result).items()))].append(run)
    groups = []
    for strategy in sorted(strategies, key=lambda s: (_ORDER.index(s) if s in _ORDER else len(_ORDER), s)):
        variants = strategies[strategy]
        seen = Counter(facet for facets in variants for facet in facets)
        for facets, members in variants.items():
            differs = [f"{key.split('.')[-1]}={v}" for key, v in facets if seen[key, v] < len(variants)]
            label = ", ".join([strategy, *dict.fromkeys(differs[:3])]) + (", …" if len(differs) > 3 else "")
            groups.append(Group(label, strategy, [run.result for run in members], [run.path for run in members]))
    return groups


def differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """What tells the groups apart: config fields, and what a run found in its place, each with its value in every group; "-"
    where it has none."""
    facets = [_facets(group.results[0]) for group in groups]
    found = {name: [one.get(name, "-") for one in facets] for name in dict.fromkeys(x for one in facets for x in one)}
    return {name: values for name, values in found.items() if name not in _DERIVED and len(set(values)) > 1}


def names_of(result: dict[str, Any]) -> list[str]:
    """The names of the classes by their labels; their numbers where the data have no names."""
    count = 1 + max(label for task in result["tasks"] for label in task)
    named = result.get("class_names") or []
    return [str(named[label]) if label < len(named) else str(label) for label in range(count)]
