"""How near rehearsal comes to training from scratch, and what of it is due to what.

    python -m experiments.studies.rehearsal --config=configs/paper_tinyimagenet.py:medium --devices=2 --workdir=DIR \\
        --config.data.source=npz:FILE --json=experiments/results/rehearsal_medium.json [--seeds=3] [--rows=er,er+balanced]

The yardsticks are training from scratch at every task, the same with as many steps as rehearsal takes in all ("equal steps"),
and joint training on all tasks at once. Every other row changes the config's plain rehearsal by what its name says. A row's
runs lie in a folder of its name; finished ones are read again. Other rows that the file of --json holds stay in it: some may
have more seeds than others.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.pages.page import Json, table
from experiments.studies import grid
from experiments.studies.grid import ROWS, Fields, Setting
from jaxcl import cli, report
from jaxcl.check import check, one_of
from jaxcl.runs.steps import STEPPING
from jaxcl.summaries import accuracy_so_far


def main() -> None:
    runs = grid.from_flags(seeds=1)
    rows = rows_of(runs.config)
    for name in ROWS.value:
        check("--rows", name, one_of(rows))
    wanted = [Setting(name, rows[name], {"row": name, "fields": dict(rows[name])}) for name in ROWS.value or rows]
    records = runs.records(wanted, summary, said)
    if cli.JSON.value:
        found = {"name": runs.config.name, "sizes": sizes(runs.config), "rows": records}
        grid.write(cli.JSON.value, merged(pathlib.Path(cli.JSON.value), found, rows))


def merged(path: pathlib.Path, found: Json, order: Iterable[str]) -> Json:
    """With the other rows of the file, if it is there and of the same name and sizes."""
    before = json.loads(path.read_text()) if path.exists() else {}
    if any(before.get(key) != found[key] for key in ("name", "sizes")):
        return found
    old = [{"commits": [before["revision"]], **one} for one in before["rows"]]
    rows = {one["row"]: one for one in [*old, *found["rows"]]}
    return found | {"rows": [rows[name] for name in order if name in rows]}


def rows_of(config: ConfigDict) -> Mapping[str, Fields]:
    """What is trained: name -> fields that it changes."""
    b, r = config.batch_size, config.buffer.representatives
    plain: dict[str, Any] = {"strategy": "er", "loss.prior": "none"}
    balanced: dict[str, Any] = {"strategy": "er", "loss.prior": "balanced"}
    return {
        "from_scratch": {"strategy": "from_scratch"},
        **from_scratch_at_equal_steps(config),
        "from_scratch 2.5x epochs": {"strategy": "from_scratch", **more_epochs(config, 2.5)},
        "joint": {"strategy": "joint"},
        "incremental": {"strategy": "incremental"},
        "er": plain,
        "er+balanced": balanced,
        "er_ace": {"strategy": "er_ace"},
        "der_pp": {"strategy": "der_pp", "strategies.der_pp.beta": 1.0, "loss.prior": "none"},
        "der_pp+balanced": {"strategy": "der_pp", "strategies.der_pp.beta": 1.0, "loss.prior": "balanced"},
        **{f"er+balanced weight {w}": balanced | {"loss.replay_weight": float(w)} for w in (2, 4, 8, 16)},
        "uer": {"strategy": "uer"},
        "er+balanced average": balanced | {"optimizer.average": 0.99, "eval.metrics": ("nmc", "nmc_top5")},
        "er+balanced later 0.3": balanced | {"optimizer.later_tasks": 0.3},
        "er+balanced later 0.1": balanced | {"optimizer.later_tasks": 0.1},
        "er later 0.1": plain | {"optimizer.later_tasks": 0.1},
        "er r=b": plain | {"buffer.representatives": b},
        "er+balanced r=b": balanced | {"buffer.representatives": b},
        "er+balanced r=b:2": balanced | {"buffer.representatives": b // 2},
        "er+balanced memory 0.05": balanced | {"buffer.share": 0.05},
        "er+balanced memory 1.0": balanced | {"buffer.share": 1.0},
        "er+balanced r=b memory 1.0": balanced | {"buffer.representatives": b, "buffer.share": 1.0},
        "er+balanced 2x steps": balanced | more_epochs(config, 2),
        "er+balanced 2.5x epochs": balanced | more_epochs(config, 2.5),
        "er+balanced r=half": balanced | {"buffer.representatives": max(r // 2, 1)},
        **{f"{name} r=b": {"strategy": name, "buffer.representatives": b} for name in ("bic", "icarl", "wa")},
    }


def equal_steps(config: ConfigDict) -> float:
    """Epochs in which training from scratch takes as many steps over all tasks as rehearsal, for tasks of equal size.

    From scratch, task t trains on the rows of t tasks: T (T + 1) / 2 in all, where rehearsal has T. Replayed rows do not count.
    """
    tasks = config.data.tasks if isinstance(config.data.tasks, int) else len(config.data.tasks)
    return config.epochs * 2 / (tasks + 1)


def from_scratch_at_equal_steps(config: ConfigDict) -> Mapping[str, Fields]:
    """As near as whole epochs come; no row where a task has too few epochs for fewer."""
    epochs = max(1, round(equal_steps(config)))
    fields = {"strategy": "from_scratch", **scaled(config, epochs)}
    return {"from_scratch equal steps": fields} if epochs < config.epochs else {}


def more_epochs(config: ConfigDict, times: float) -> dict[str, Any]:
    return scaled(config, round(config.epochs * times))


def scaled(config: ConfigDict, epochs: int) -> dict[str, Any]:
    """So many epochs a task, with the learning rate's schedule in proportion."""
    o, share = config.optimizer, epochs / config.epochs
    return {
        "epochs": epochs,
        "optimizer.warmup_epochs": o.warmup_epochs * share,
        "optimizer.decay_epochs": tuple(epoch * share for epoch in o.decay_epochs),
    }


def sizes(config: ConfigDict) -> Json:
    buffer = config.buffer
    return {
        "batch_size": config.batch_size,
        "representatives": buffer.representatives,
        "candidates": buffer.candidates,
        "share": buffer.share,
        "capacity": buffer.capacity,
        "epochs": config.epochs,
    }


def summary(runs: list[Json]) -> Json:
    """Of a row, one entry a seed."""
    return {
        "top5": [run["top5_so_far"][-1] for run in runs],
        "top1": [run["average_accuracy"] for run in runs],
        "top5_so_far": [run["top5_so_far"] for run in runs],
        "top1_so_far": [accuracy_so_far(run["accuracy_matrix"]).tolist() for run in runs],
        "in_task": [float(np.mean(run["accuracy_in_task"])) for run in runs],
        "called_new": [called_new(run) for run in runs],
        "steps": [run["steps"] for run in runs],
        "commits": sorted({run["commit"] for run in runs}),
        "seconds": [run["seconds"] for run in runs],
        "seconds_of_steps": [sum(run["seconds_by_phase"].get(name, 0.0) for name in STEPPING) for run in runs],
    }


def called_new(run: Json) -> float | None:
    """Of the test rows of earlier tasks, the share that is called a class of the last task."""
    if "confusion" not in run or len(run["tasks"]) < 2:
        return None
    confusion, new = np.array(run["confusion"]), np.zeros(len(run["confusion"]), bool)
    new[run["tasks"][-1]] = True
    old = confusion[~new]
    return float(old[:, new].sum() / max(old.sum(), 1))


def markdown(found: Json) -> str:
    """A table of the rows, beside training from scratch."""
    s, rows = found["sizes"], {one["row"]: one for one in found["rows"]}
    scratch = rows.get("from_scratch")

    def over(one: Json, key: str) -> str:
        return "" if scratch is None else f"{100 * np.mean(one[key]) / np.mean(scratch[key]):.1f} %"

    cells = [
        (
            *(name, len(one["top5"]), f"{one['steps'][0]:,}"),
            *(report.spread(one[key], digits=1) for key in ("top5", "top1")),
            *(over(one, key) for key in ("top5", "top1")),
            "" if one["called_new"][0] is None else f"{100 * np.mean(one['called_new']):.0f} %",
            f"{100 * np.mean(one['in_task']):.1f}",
        )
        for name, one in rows.items()
    ]
    head = (
        *("trained", "seeds", "steps", "top-5, %", "top-1, %", "top-5 of from scratch", "top-1 of from scratch"),
        *("old rows called a new class", "right within the task, %"),
    )
    return (
        f"{found['name']}: {s['epochs']} epochs a task, b = {s['batch_size']}, r = {s['representatives']},"
        f" a memory of {memory_of(s)} unless a row says otherwise.\n\n{table(head, cells)}{revisions(rows)}"
    )


def revisions(rows: Mapping[str, Json]) -> str:
    """The rows of each commit of the code, where a file has rows of several."""
    found: dict[str, list[str]] = {}
    for name, one in rows.items():
        found.setdefault(" and ".join(one.get("commits", [])), []).append(name)
    if len(found) < 2:
        return ""
    return (
        "\n\nCode: "
        + "; ".join(f"{commit or 'that of the file'} of {', '.join(names)}" for commit, names in found.items())
        + "."
    )


def memory_of(sizes: Json) -> str:
    return f"{sizes['capacity']:,} rows" if sizes["share"] is None else f"{100 * sizes['share']:g} %"


def said(record: Json) -> str:
    return f"top-5 {report.spread(record['top5'])} %, top-1 {report.spread(record['top1'])} %"


if __name__ == "__main__":
    cli.run(main)
