"""One memory or one for each device: what DyTox's erratum is about, its causes apart.

    python -m experiments.studies.memory_modes --config=configs/memory_modes_mnist.py --workdir=DIR --devices=8
        [--json=experiments/results/memory_modes.json] [--seeds=3] [--counts=1,2,4,8] [--selections=random,...]

Every setting trains the tasks of the config with several seeds. In the grid, with B = `buffer.capacity` rows and N devices:

  sharded      one choice of B rows, divided by the devices: one budget, the same experiment on any N, so it is run for the
               least N alone, and with the last selection for the greatest to show it
  replicated   one choice of B / N rows, held by every device
  independent  N choices of B / N rows, each device its own: DyTox's "distributed memory" at an equal budget
  ways         the same N choices on one device; with the last selection and the greatest N
  n_times      N choices of B rows: N times the budget, as DyTox was first published

Then, for the last selection and the greatest N, one thing after another is changed between one memory and the published
comparison; the difference that each makes is that of runs of the same seed. Finished runs in the workdir are not run again.
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import cli
from experiments.bench.harness import environment
from jaxcl import report
from jaxcl.buffer.selection import SELECTIONS
from jaxcl.errors import UserError
from jaxcl.search.seeds import train_seeds

COUNTS = flags.DEFINE_list("counts", ["1", "2", "4", "8"], "numbers of devices")
SELECT = flags.DEFINE_list("selections", list(SELECTIONS), "selections of the grid; the last is taken apart")

COLORS = {"sharded": "#0072B2", "replicated": "#E69F00", "independent": "#D55E00", "n_times": "#999999"}
MODES = {"sharded": "sharded", "replicated": "replicated", "independent": "independent", "n_times": "independent"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting; what is not said is as in the config.

    Attributes:
      mode: sharded | replicated | independent | ways | n_times.
      by: the selection.
      count: N, devices or ways.
      features, keys, replay: fields of `config.buffer` and its `selection`.
      drawn: representatives a step, of replay = draw.
      finetune: none | shuffled | sequential.
    """

    mode: str
    by: str
    count: int
    features: str = "augmented"
    keys: str = "per_shard"
    replay: str = "append"
    drawn: int | None = None
    finetune: str = "shuffled"

    @property
    def folder(self) -> str:
        return "-".join(str(x) for x in dataclasses.astuple(self) if x is not None)

    @property
    def devices(self) -> int:
        return 1 if self.mode == "ways" else self.count

    def config(self, base: ConfigDict) -> ConfigDict:
        config = base.copy_and_resolve_references()
        buffer, select = config.buffer, config.buffer.selection
        buffer.memory = MODES.get(self.mode, "sharded")
        if self.mode in ("replicated", "independent"):
            buffer.capacity = base.buffer.capacity // self.count
        select.ways = self.count if self.mode == "ways" else 1
        select.by, select.features, select.random_keys = self.by, self.features, self.keys
        buffer.replay = self.replay
        buffer.representatives = self.drawn or base.buffer.representatives
        if self.finetune == "none":
            config.finetune.epochs = 0
        else:
            config.finetune.order = self.finetune
        return config


def grid(counts: list[int], selections: list[str]) -> list[Setting]:
    least, most, last = min(counts), max(counts), selections[-1]
    settings = [Setting("sharded", by, least) for by in selections]
    settings += [
        Setting(mode, by, n)
        for by in selections
        for mode in ("replicated", "independent", "n_times")
        for n in counts
        if n > 1
    ]
    return [*settings, Setting("sharded", last, most), Setting("ways", last, most)]


def changes(by: str, count: int) -> list[tuple[str, Setting, Setting]]:
    """What is changed, from which setting to which."""
    one = Setting("sharded", by, count)
    clean = dataclasses.replace(one, features="clean")
    same, own = (Setting("independent", by, count, keys=keys) for keys in ("shared", "per_shard"))
    part = dataclasses.replace(own, replay="append_part")
    none, in_order = ({"finetune": name} for name in ("none", "sequential"))
    replace = dataclasses.replace
    erratum = replace(part, **in_order)
    published = replace(erratum, mode="n_times")
    return [
        ("features of augmented images", clean, one),
        ("N choices with the same keys", one, same),
        ("keys of their own", same, own),
        ("each appends its own", own, part),
        ("N times the budget", own, replace(own, mode="n_times")),
        ("N times, as many drawn", own, replace(part, mode="n_times")),
        ("8 rows drawn a step", one, replace(one, replay="draw", drawn=8)),
        ("128 rows drawn a step", one, replace(one, replay="draw", drawn=128)),
        ("fine-tuning, one memory", replace(one, **none), one),
        ("fine-tuning, N memories", replace(own, **none), own),
        ("class-sorted order, one memory", one, replace(one, **in_order)),
        ("class-sorted order, N memories", own, replace(own, **in_order)),
        ("N memories, shuffled order", one, own),
        ("N memories, class-sorted order", replace(one, **in_order), replace(own, **in_order)),
        ("all at an equal budget", replace(one, **in_order), erratum),
        ("all, as published", replace(one, **in_order), published),
    ]


def summary(setting: Setting, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the runs of one setting hold and reach; a list has one entry a seed."""
    buffers = [run["buffer"] for run in runs]
    histogram = np.mean([buffer["class_histogram"] for buffer in buffers], axis=0)
    return {
        **dataclasses.asdict(setting),
        "seeds": [run["seed"] for run in runs],
        "rows": buffers[0]["rows"],
        "distinct_ids": [buffer["distinct_ids"] for buffer in buffers],
        "overlap": [buffer["overlap"] for buffer in buffers],
        "class_histogram": histogram.tolist(),
        "draws_per_epoch": runs[0]["replay"]["draws_per_epoch"],
        "finetune_rows_per_epoch": runs[0]["replay"].get("finetune_rows_per_epoch", []),
        "average_accuracy": [run["average_accuracy"] for run in runs],
        "average_incremental_accuracy": [run["average_incremental_accuracy"] for run in runs],
    }


def spread(values: list[float], scale: float = 100.0) -> str:
    return f"{scale * np.mean(values):.2f} ± {scale * np.std(values, ddof=1):.2f}"


def table(found: list[dict[str, Any]]) -> str:
    header = ["selection", "mode", "N", "rows", "distinct", "overlap %", "a class", "drawn an epoch", "accuracy %"]
    rows = [[*header, "incremental %"]]
    for one in found:
        counts = one["class_histogram"]
        rows.append(
            [one["by"], one["mode"], str(one["count"]), str(one["rows"])]
            + [f"{np.mean(one['distinct_ids']):.0f}", f"{100 * np.mean(one['overlap']):.1f}"]
            + [f"{min(counts):.0f}" + (f" to {max(counts):.0f}" if min(counts) < max(counts) else "")]
            + [str(one["draws_per_epoch"][-1])]
            + [spread(one[name]) for name in ("average_accuracy", "average_incremental_accuracy")]
        )
    return report.text_table(rows)


def effects(base: list[tuple[str, Setting, Setting]], found: dict[Setting, dict[str, Any]]) -> list[dict[str, Any]]:
    """The difference that each change makes, seed by seed."""
    names = ("average_accuracy", "average_incremental_accuracy")
    return [
        {
            "change": name,
            "from": before.folder,
            "to": after.folder,
            "draws_per_epoch": [found[x]["draws_per_epoch"][-1] for x in (before, after)],
            "distinct_ids": [float(np.mean(found[x]["distinct_ids"])) for x in (before, after)],
            **{key: np.subtract(found[after][key], found[before][key]).tolist() for key in names},
        }
        for name, before, after in base
    ]


def effect_table(found: list[dict[str, Any]]) -> str:
    rows = [["change", "distinct", "drawn an epoch", "accuracy, points", "incremental, points"]]
    for one in found:
        arrows = ["{:.0f} -> {:.0f}".format(*one[name]) for name in ("distinct_ids", "draws_per_epoch")]
        rows.append([one["change"], *arrows, spread(one["average_accuracy"])])
        rows[-1].append(spread(one["average_incremental_accuracy"]))
    return report.text_table(rows)


def draw(found: dict[str, Any]) -> Figure:
    """Accuracy by devices for every selection; rows that differ; the difference that every change makes."""
    selections = list(dict.fromkeys(one["by"] for one in found["grid"]))
    figure = Figure(figsize=(3.2 * len(selections), 7), layout="constrained")
    halves = figure.add_gridspec(2, 1)
    top = halves[0].subgridspec(1, len(selections))
    panels = [figure.add_subplot(top[0])]
    panels += [figure.add_subplot(top[i], sharey=panels[0]) for i in range(1, len(selections))]
    for axes, by in zip(panels, selections, strict=True):
        lines(axes, [one for one in found["grid"] if one["by"] == by], "average_accuracy", 100)
        axes.set(title=by, xlabel="devices")
    panels[0].set_ylabel("accuracy after the last task, %")
    low = halves[1].subgridspec(1, 2, width_ratios=[1, 1.6])
    left, right = figure.add_subplot(low[0]), figure.add_subplot(low[1])
    lines(left, [one for one in found["grid"] if one["by"] == selections[-1]], "distinct_ids", 1)
    left.set(title=f"{selections[-1]}: rows that differ", xlabel="devices", yscale="log")
    left.legend()
    rows = found["effects"][::-1]
    mean = [100 * np.mean(one["average_accuracy"]) for one in rows]
    error = [100 * np.std(one["average_accuracy"], ddof=1) for one in rows]
    right.barh([one["change"] for one in rows], mean, xerr=error, color="#0072B2", ecolor="#39424b")
    right.axvline(0, color="#8a939c", linewidth=1)
    right.set(title="What each change does to the accuracy, points")
    return figure


def lines(axes: Axes, found: list[dict[str, Any]], name: str, scale: float) -> None:
    """A line a mode over N; one memory, which is the same for every N, is drawn across."""
    counts = sorted({one["count"] for one in found})
    for mode, color in COLORS.items():
        some = sorted((one for one in found if one["mode"] == mode), key=lambda one: one["count"])
        if mode == "sharded":
            axes.axhline(scale * np.mean(some[0][name]), color=color, label=mode)
            continue
        x, y = [one["count"] for one in some], [scale * np.array(one[name]) for one in some]
        axes.errorbar(
            x, [v.mean() for v in y], [v.std(ddof=1) for v in y], color=color, marker="o", capsize=2, label=mode
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.grid(alpha=0.3)


def main() -> None:
    config, workdir = cli.required(cli.CONFIG), pathlib.Path(cli.required(cli.WORKDIR))
    counts, selections = check(config)
    jax.config.update(
        "jax_compilation_cache_dir", str(workdir / "compiled")
    )  # settings differ in data more than in steps
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    of_grid, apart = grid(counts, selections), changes(selections[-1], max(counts))
    settings = list(dict.fromkeys([*(x for _, *pair in apart for x in pair), *of_grid]))
    begin, found = time.perf_counter(), {}
    seeds = range(config.seed, config.seed + cli.seeds(default=3))
    for number, setting in enumerate(settings, start=1):
        folders = {seed: workdir / setting.folder / f"seed_{seed}" for seed in seeds}
        devices = jax.devices()[: setting.devices]
        runs = train_seeds(setting.config(config), folders, devices=devices, overwrite=cli.OVERWRITE.value)
        found[setting] = summary(setting, runs)
        accuracy = spread(found[setting]["average_accuracy"])
        print(
            f"{number} of {len(settings)}, {time.perf_counter() - begin:.0f} s: {setting.folder}: {accuracy}",
            flush=True,
        )
    result = {
        "name": config.name,
        "capacity": config.buffer.capacity,
        "grid": [found[x] for x in of_grid],
        "apart": [found[x] for x in dict.fromkeys(x for _, *pair in apart for x in pair)],
        "effects": effects(apart, found),
        **environment(),
    }
    print(table(result["grid"]))
    print(effect_table(result["effects"]))
    for file in [workdir / "memory_modes.json", *([pathlib.Path(cli.JSON.value)] if cli.JSON.value else [])]:
        file.write_text(json.dumps(result, indent=1) + "\n")
        file.with_suffix(".png").write_bytes(report.png(functools.partial(draw, result)))
        print(f"wrote {file} and {file.with_suffix('.png')}")


def check(config: ConfigDict) -> tuple[list[int], list[str]]:
    """Numbers of devices and selections.

    Raises:
      UserError: one line on what is wrong with flags or config.
    """
    if not all(n.isdecimal() and int(n) for n in COUNTS.value):
        raise UserError(f"--counts: {','.join(COUNTS.value)} is not allowed, give positive integers")
    counts = sorted({int(n) for n in COUNTS.value})
    cli.seeds(default=3, least=2)
    if counts[-1] < 2:
        raise UserError(f"--counts: {counts[-1]} is not allowed, give a number of devices above 1")
    if counts[-1] > jax.device_count():
        raise UserError(
            f"--counts: {counts[-1]} is more than the {jax.device_count()} devices; on a CPU give --devices"
        )
    for by in SELECT.value:
        if by not in SELECTIONS:
            raise UserError(f"--selections: {by!r} is unknown, choose from {', '.join(SELECTIONS)}")
    if config.buffer.capacity % counts[-1]:
        raise UserError(
            f"buffer.capacity: {config.buffer.capacity} cannot be shared evenly by {counts[-1]} devices, give a multiple"
        )
    return counts, SELECT.value


if __name__ == "__main__":
    cli.run(main)
