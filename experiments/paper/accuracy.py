"""Figure 1: accuracy after each task from scratch, incrementally and with rehearsal, and what it costs in run time.

The paper's figure is the top-5 accuracy, averaged over the tasks so far. Run time is that of the steps (loading, assembling,
waiting, training), without compilation, evaluation and checkpoints. A step of rehearsal trains on b + r rows where a plain one
trains on b, so its run time over the incremental one's can be (b + r) / b at best; the goal is at most 1.02 times that.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.pages.page import table
from experiments.paper.draw import panels
from experiments.paper.study import STRATEGIES, Json, Study
from jaxcl.errors import UserError
from jaxcl.report import color_of
from jaxcl.runs.steps import STEPPING
from jaxcl.summaries import accuracy_so_far

PAPER = 0.8055 / 0.91  # top-5 accuracy with rehearsal over that from scratch, ResNet-50, 30 %
SLACK = 1.02


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
    top5 = {name: np.mean([row[-1] for row in x["top5_so_far"]]) for name, x in found.items()}
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
            for strategy, label in STRATEGIES.items():
                values = 100 * np.array(x[strategy][key])
                tasks, color = range(1, found["tasks"] + 1), color_of(strategy)
                axes.plot(tasks, values.mean(0), color=color, marker="o", ms=4, label=label)
                axes.fill_between(tasks, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
            axes.set_ylim(0, 102)
            axes.set_xticks(range(1, found["tasks"] + 1))
            axes.set_title(f"{model}: {title}", loc="left", fontsize=9)
            axes.set_ylabel("%, mean of tasks so far")
    for axes in rows[-1]:
        axes.set_xlabel("tasks trained")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def mean(values: Any, scale: float = 100, digits: int = 1) -> str:
    """With several seeds also their sample deviation."""
    values = scale * np.asarray(values, np.float64)
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def row(model: str, strategy: str, x: Json) -> tuple[str, ...]:
    last = [[values[-1] for values in x[key]] for key in ("top5_so_far", "top1_so_far")]
    seconds = x["seconds_of_steps"]
    return (model, STRATEGIES[strategy], str(len(seconds)), *(mean(values) for values in last), mean(seconds, 1))


def paragraph(found: Json) -> str:
    s = found["sizes"]
    ratios = table(
        ("model", "top-5 over from scratch", "run time over incremental", "goal", "run time over from scratch"),
        (
            (
                model,
                f"{100 * x['top5_over_from_scratch']:.1f} %",
                f"{x['time_over_incremental']:.2f}",
                f"{found['goal']:.2f}",
                f"{x['time_over_from_scratch']:.2f}",
            )
            for model, x in found["models"].items()
        ),
    )
    return "\n\n".join(
        [
            f"{found['name']}: {found['tasks']} tasks, {found['classes']} classes, {s['epochs']} epochs a task;"
            f" {s['batch_size']} new rows a step, {s['candidates']} offered to the memory, {s['representatives']} replayed;"
            f" a memory of {found['capacity']:,} rows. After the last task:",
            table(
                ("model", "", "seeds", "top-5, %", "top-1, %", "run time, s"),
                (row(model, strategy, x[strategy]) for model, x in found["models"].items() for strategy in STRATEGIES),
            ),
            f"The two ratios of the paper, which reports a top-5 accuracy of {100 * PAPER:.1f} % of that from scratch; the goal"
            f" of the run time is (b + r) / b x {SLACK}. The runs were made one after the other, so that what the machine did"
            " between them is in the ratios of time; figure 4 takes its steps in turn:",
            ratios,
        ]
    )


def sentence(found: Json, swept: Json | None = None) -> str:
    """For the front page: the two ratios, with the data and the devices on which they were found, and the most that figure 2
    found for r."""
    s, devices, models = found["sizes"], found["devices"], found["models"]

    def each(ratio: str, scale: float = 1, digits: int = 2) -> str:
        return " and ".join(f"{scale * x[ratio]:.{digits}f}" for x in models.values())

    most = ""
    if swept is not None:
        scratch = np.mean([values[-1] for values in swept["bounds"]["from_scratch"]["top5_so_far"]])
        point = max(swept["swept"]["buffer.representatives"], key=lambda x: x["value"])
        share = np.mean([values[-1] for values in point["top5_so_far"]]) / scratch
        most = f" ({swept['model']} with {point['value']} replayed: {100 * share:.0f} %)"
    kind = "fake CPU" if devices["platform"] == "cpu" else devices["kind"]
    return (
        f"**The paper's figure, small**: {found['name']}, {s['batch_size']} new and {s['representatives']} replayed rows a"
        f" step, on {devices['count']} {kind} devices of {found['machine']['cores']} cores; {' and '.join(models)}. Rehearsal"
        f" reaches {each('top5_over_from_scratch', 100, 0)} % of the top-5 accuracy of training from scratch{most}, in"
        f" {each('time_over_incremental')} times the run time of incremental training and"
        f" {each('time_over_from_scratch')} times that of training from scratch. The paper, on ImageNet-1k:"
        f" {100 * PAPER:.1f} %. [All figures](docs/paper.md)."
    )
