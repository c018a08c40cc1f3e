"""Figure 1: accuracy after each task from scratch, incrementally and with rehearsal, and what it costs in run time.

The paper's figure is the top-5 accuracy, averaged over the tasks so far. Run time is that of the steps (loading, assembling,
waiting, training), without compilation, evaluation and checkpoints. A step of rehearsal trains on b + r rows where a plain one
trains on b, so its run time over the incremental one's can be (b + r) / b at best; the goal is at most 1.02 times that.
"""

import numpy as np
from matplotlib.figure import Figure

from experiments.pages.page import Json, table
from experiments.paper.draw import panels
from experiments.paper.study import STRATEGIES, Study
from experiments.studies.grid import Fields
from jaxcl.errors import UserError
from jaxcl.report import color_of, spread
from jaxcl.runs.steps import STEPPING
from jaxcl.summaries import accuracy_so_far

TITLE = "1. Accuracy after each task"
PAPER = 0.8055 / 0.91  # top-5 accuracy with rehearsal over that from scratch, ResNet-50, 30 %
SLACK = 1.02
PLAIN: Fields = {"loss.prior": "none"}  # where the config has another one, rehearsal is shown without it too
LINES = STRATEGIES | {"er_plain": "rehearsal, plain loss"}


def measure(study: Study) -> Json:
    c = study.config
    models = {model: of_model(study, model) for model in study.models}
    first = next(iter(models.values()))["er"]
    new, drawn = c.batch_size, c.buffer.representatives
    return {
        "name": c.name,
        "tasks": len(first["tasks"]),
        "classes": sum(map(len, first["tasks"])),
        "sizes": {"batch_size": new, "representatives": drawn, "candidates": c.buffer.candidates, "epochs": c.epochs},
        "capacity": first["capacity"],
        "goal": (new + drawn) / new * SLACK,
        "models": models,
    }


def of_model(study: Study, model: str) -> Json:
    """Every strategy's figures, one entry a seed, and the ratios of their means."""
    found: Json = {strategy: summary(study.runs(model, strategy)) for strategy in STRATEGIES}
    if study.config.loss.prior != "none":
        found["er_plain"] = summary(study.runs(model, "er", PLAIN))
    top5 = {name: np.mean(last(x["top5_so_far"])) for name, x in found.items()}
    seconds = {name: np.mean(x["seconds_of_steps"]) for name, x in found.items()}
    return found | {
        "top5_over_from_scratch": float(top5["er"] / top5["from_scratch"]),
        "time_over_incremental": float(seconds["er"] / seconds["incremental"]),
        "time_over_from_scratch": float(seconds["er"] / seconds["from_scratch"]),
    }


def summary(runs: list[Json]) -> Json:
    """Of one strategy's runs, one entry a seed.

    Raises:
      UserError: the data have too few classes for a top-5 accuracy.
    """
    if any("top5_so_far" not in run for run in runs):
        raise UserError("figure accuracy: top-5 accuracy says nothing of five classes; give a config with more")
    buffer = runs[0]["buffer"]
    return {
        "tasks": runs[0]["tasks"],
        "capacity": buffer and buffer["capacity"],
        "top5_so_far": [run["top5_so_far"] for run in runs],
        "top1_so_far": [accuracy_so_far(run["accuracy_matrix"]).tolist() for run in runs],
        "images": runs[0]["images"],
        "seconds_of_steps": [sum(run["seconds_by_phase"].get(name, 0.0) for name in STEPPING) for run in runs],
        "seconds": [run["seconds"] for run in runs],
    }


def picture(found: Json) -> Figure:
    """A row a model: top-5 and top-1, averaged over the tasks so far; mean and range of the seeds."""
    figure, rows = panels(2, len(found["models"]), width=3.9, height=2.7)
    for row, (model, x) in zip(rows, found["models"].items(), strict=True):
        for axes, (key, title) in zip(row, (("top5_so_far", "top-5"), ("top1_so_far", "top-1")), strict=True):
            for strategy, label in lines(x).items():
                values = 100 * np.array(x[strategy][key])
                tasks, color = range(1, found["tasks"] + 1), color_of(strategy.removesuffix("_plain"))
                style = "--" if strategy.endswith("_plain") else "-"
                axes.plot(tasks, values.mean(0), color=color, ls=style, marker="o", ms=4, label=label)
                axes.fill_between(tasks, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
            axes.set_ylim(0, 102)
            axes.set_xticks(range(1, found["tasks"] + 1))
            axes.set_title(f"{model}: {title}", loc="left", fontsize=9)
            axes.set_ylabel("%, mean of tasks so far")
    for axes in rows[-1]:
        axes.set_xlabel("tasks trained")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def lines(of_model: Json) -> dict[str, str]:
    """What was trained: name -> label."""
    return {name: label for name, label in LINES.items() if name in of_model}


def last(values: list[list[float]]) -> list[float]:
    """Of each seed, the value after the last task."""
    return [row[-1] for row in values]


def mean(values: list[float], scale: float = 100) -> str:
    return spread(values, scale, digits=1)


def over_from_scratch(of_model: Json, key: str) -> float:
    """The mean over seeds with rehearsal over that from scratch, after the last task."""
    er, scratch = (np.mean(last(of_model[name][key])) for name in ("er", "from_scratch"))
    return float(er / scratch)


RATIOS = (
    "top-5 over from scratch",
    "top-1 over from scratch",
    "run time over incremental",
    "run time over from scratch",
)


def ratios(found: Json, digits: int) -> list[tuple[str, ...]]:
    """A row a model; `digits` of the percentage."""
    return [
        (
            model,
            *(f"{100 * over_from_scratch(x, key):.{digits}f} %" for key in ("top5_so_far", "top1_so_far")),
            *(f"{x[name]:.2f}" for name in ("time_over_incremental", "time_over_from_scratch")),
        )
        for model, x in found["models"].items()
    ]


def markdown(found: Json) -> str:
    s, goal = found["sizes"], f"{found['goal']:.2f}"
    accuracies = [
        (
            *(model, label, len(x[strategy]["seconds_of_steps"])),
            *(mean(last(x[strategy][key])) for key in ("top5_so_far", "top1_so_far")),
            mean(x[strategy]["seconds_of_steps"], 1),
        )
        for model, x in found["models"].items()
        for strategy, label in lines(x).items()
    ]
    paper = ("the paper, ResNet-50", f"{100 * PAPER:.1f} %", "", "", "", "")
    return "\n\n".join(
        [
            f"{found['name']}: {found['tasks']} tasks, {found['classes']} classes, {s['epochs']} epochs a task;"
            f" {s['batch_size']} new rows a step, {s['candidates']} offered to the memory, {s['representatives']} replayed;"
            f" a memory of {found['capacity']:,} rows.",
            table(("model", "", "seeds", "top-5, %", "top-1, %", "run time, s"), accuracies),
            table(("model", *RATIOS, "goal over incremental"), [*((*row, goal) for row in ratios(found, 1)), paper]),
        ]
    )
