"""One memory or one for each device: what DyTox's erratum is about, its causes apart.

    python -m experiments.studies.memory_modes --config=configs/memory_modes_mnist.py --workdir=DIR --devices=8
        [--json=experiments/results/memory_modes.json] [--seeds=3] [--counts=1,2,4,8] [--selections=random,...]

Every setting trains the tasks of the config with several seeds. In the grid, with B = `buffer.capacity` rows and N devices:

  sharded      one choice of B rows, divided by the devices: one budget. It is the same experiment on any N, so it is run for
               the least N alone, and with the last selection for the greatest to show it
  replicated   one choice of B / N rows, held by every device
  independent  N choices of B / N rows, each device its own: DyTox's "distributed memory" at an equal budget
  ways         the same N choices on one device; with the last selection and the greatest N
  n_times      N choices of B rows: N times the budget, as DyTox was first published

Then, for the last selection and the greatest N, one thing after another is changed between one memory and the published
comparison. The difference that each makes is that of runs of the same seed. The picture is written beside the JSON file;
experiments.pages fills the tables into docs/memory_modes.md.
"""

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.pages import page
from experiments.pages.page import Json
from experiments.studies import grid
from experiments.studies.grid import Setting
from jaxcl import cli, report
from jaxcl.buffer.selection import SELECTIONS
from jaxcl.check import check, one_of, refused
from jaxcl.search.seeds import train_seeds

COUNTS = flags.DEFINE_list("counts", ["1", "2", "4", "8"], "numbers of devices")
SELECT = flags.DEFINE_list("selections", list(SELECTIONS), "selections of the grid; the last is taken apart")

COLORS = {"sharded": "#0072B2", "replicated": "#E69F00", "independent": "#D55E00", "n_times": "#999999"}
PAGE = page.ROOT / "docs" / "memory_modes.md"
MEASURES = ("average_accuracy", "average_incremental_accuracy")


@dataclasses.dataclass(frozen=True)
class Mode:
    """A memory and what trains with it; what is not said is as in the config.

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

    def setting(self, capacity: int) -> Setting:
        """What is trained, of a config with this capacity."""
        memories = {"ways": "sharded", "n_times": "independent"}
        each = capacity // self.count if self.mode in ("replicated", "independent") else capacity
        fields = {
            "buffer.memory": memories.get(self.mode, self.mode),
            "buffer.capacity": each,
            "buffer.replay": self.replay,
            "buffer.selection.by": self.by,
            "buffer.selection.features": self.features,
            "buffer.selection.random_keys": self.keys,
            "buffer.selection.ways": self.count if self.mode == "ways" else 1,
        }
        fields |= {"buffer.representatives": self.drawn} if self.drawn else {}
        fields |= {"finetune.epochs": 0} if self.finetune == "none" else {"finetune.order": self.finetune}
        return Setting(self.folder, fields, dataclasses.asdict(self), 1 if self.mode == "ways" else self.count)


def modes(counts: list[int], selections: list[str]) -> list[Mode]:
    """Those of the grid."""
    least, most, last = min(counts), max(counts), selections[-1]
    several = ("replicated", "independent", "n_times")
    found = [Mode("sharded", by, least) for by in selections]
    found += [Mode(mode, by, n) for by in selections for mode in several for n in counts if n > 1]
    return [*found, Mode("sharded", last, most), Mode("ways", last, most)]


def changes(by: str, count: int) -> list[tuple[str, Mode, Mode]]:
    """What is changed, from which mode to which."""
    replace = dataclasses.replace
    one = Mode("sharded", by, count)
    same, own = (Mode("independent", by, count, keys=keys) for keys in ("shared", "per_shard"))
    part = replace(own, replay="append_part")
    none, in_order = ({"finetune": name} for name in ("none", "sequential"))
    erratum = replace(part, **in_order)
    return [
        ("features of augmented images", replace(one, features="clean"), one),
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
        ("all, as published", replace(one, **in_order), replace(erratum, mode="n_times")),
    ]


def summary(runs: list[Json]) -> Json:
    """What the runs of one mode hold and reach; a list has one entry a seed."""
    buffers, replay = [run["buffer"] for run in runs], runs[0]["replay"]
    return {
        "seeds": [run["seed"] for run in runs],
        "rows": buffers[0]["rows"],
        **grid.each(buffers, "distinct_ids", "overlap"),
        "class_histogram": np.mean([buffer["class_histogram"] for buffer in buffers], axis=0).tolist(),
        "draws_per_epoch": replay["draws_per_epoch"],
        "finetune_rows_per_epoch": replay.get("finetune_rows_per_epoch", []),
        **grid.each(runs, *MEASURES),
    }


def effects(apart: Iterable[tuple[str, Mode, Mode]], found: dict[Mode, Json]) -> list[Json]:
    """The difference that each change makes, seed by seed."""
    return [
        {
            "change": name,
            "from": before.folder,
            "to": after.folder,
            "draws_per_epoch": [found[x]["draws_per_epoch"][-1] for x in (before, after)],
            "distinct_ids": [float(np.mean(found[x]["distinct_ids"])) for x in (before, after)],
            **{key: np.subtract(found[after][key], found[before][key]).tolist() for key in MEASURES},
        }
        for name, before, after in apart
    ]


def grid_table(found: list[Json]) -> str:
    header = ["selection", "mode", "N", "rows", "distinct", "overlap %", "a class", "drawn an epoch", "accuracy %"]
    rows = [[*header, "incremental %"]]
    for one in found:
        least, most = min(one["class_histogram"]), max(one["class_histogram"])
        rows.append(
            [one["by"], one["mode"], str(one["count"]), str(one["rows"])]
            + [f"{np.mean(one['distinct_ids']):.0f}", f"{100 * np.mean(one['overlap']):.1f}"]
            + [f"{least:.0f} to {most:.0f}" if least < most else f"{least:.0f}", str(one["draws_per_epoch"][-1])]
            + [report.spread(one[name]) for name in MEASURES]
        )
    return report.text_table(rows)


def effect_table(found: list[Json]) -> str:
    rows = [["change", "distinct", "drawn an epoch", "accuracy, points", "incremental, points"]]
    for one in found:
        arrows = ["{:.0f} -> {:.0f}".format(*one[name]) for name in ("distinct_ids", "draws_per_epoch")]
        rows.append([one["change"], *arrows, *(report.spread(one[name]) for name in MEASURES)])
    return report.text_table(rows)


def picture(found: Json) -> Figure:
    """Accuracy by devices for every selection; rows that differ; the difference that every change makes."""
    selections = list(dict.fromkeys(one["by"] for one in found["grid"]))
    figure = Figure(figsize=(3.2 * len(selections), 7), layout="constrained")
    halves = figure.add_gridspec(2, 1)
    top = halves[0].subgridspec(1, len(selections))
    panels = [figure.add_subplot(top[0])]
    panels += [figure.add_subplot(top[i], sharey=panels[0]) for i in range(1, len(selections))]
    for axes, by in zip(panels, selections, strict=True):
        _lines(axes, [one for one in found["grid"] if one["by"] == by], "average_accuracy", 100)
        axes.set(title=by, xlabel="devices")
    panels[0].set_ylabel("accuracy after the last task, %")
    low = halves[1].subgridspec(1, 2, width_ratios=[1, 1.6])
    left, right = figure.add_subplot(low[0]), figure.add_subplot(low[1])
    _lines(left, [one for one in found["grid"] if one["by"] == selections[-1]], "distinct_ids", 1)
    left.set(title=f"{selections[-1]}: rows that differ", xlabel="devices", yscale="log")
    left.legend()
    rows = found["effects"][::-1]
    mean = [100 * np.mean(one["average_accuracy"]) for one in rows]
    error = [100 * np.std(one["average_accuracy"], ddof=1) for one in rows]
    right.barh([one["change"] for one in rows], mean, xerr=error, color="#0072B2", ecolor="#39424b")
    right.axvline(0, color="#8a939c", linewidth=1)
    right.set(title="What each change does to the accuracy, points")
    return figure


def _lines(axes: Axes, found: list[Json], name: str, scale: float) -> None:
    """A line a mode over N; one memory, which is the same for every N, is drawn across."""
    counts = sorted({one["count"] for one in found})
    for mode, color in COLORS.items():
        some = sorted((one for one in found if one["mode"] == mode), key=lambda one: one["count"])
        if mode == "sharded":
            axes.axhline(float(scale * np.mean(some[0][name])), color=color, label=mode)
            continue
        x, y = [one["count"] for one in some], scale * np.array([one[name] for one in some])
        axes.errorbar(x, y.mean(1), y.std(1, ddof=1), color=color, marker="o", capsize=2, label=mode)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.grid(alpha=0.3)


def sections(found: Json) -> dict[str, str]:
    """What docs/memory_modes.md shows behind each mark."""
    tables = {"grid": grid_table(found["grid"]), "effects": effect_table(found["effects"])}
    return {mark: f"```\n{table}\n```" for mark, table in tables.items()}


def write() -> None:
    page.fill(PAGE, sections(page.load("memory_modes")))


def main() -> None:
    study = grid.from_flags(seeds=3, least=2, train=train_seeds)
    capacity = study.config.buffer.capacity
    counts, selections = check_flags(capacity), SELECT.value
    of_grid, apart = modes(counts, selections), changes(selections[-1], max(counts))
    of_apart = list(dict.fromkeys(x for _, *pair in apart for x in pair))
    every = list(dict.fromkeys([*of_apart, *of_grid]))
    found = dict(zip(every, study.records([x.setting(capacity) for x in every], summary), strict=True))
    result = {
        "name": study.config.name,
        "capacity": capacity,
        "grid": [found[x] for x in of_grid],
        "apart": [found[x] for x in of_apart],
        "effects": effects(apart, found),
    }
    print(grid_table(result["grid"]))
    print(effect_table(result["effects"]))
    grid.write(cli.JSON.value or study.workdir / "memory_modes.json", result, picture)


def check_flags(capacity: int) -> list[int]:
    """The numbers of devices.

    Raises:
      UserError: one line on what is wrong with flags or config.
    """
    if not all(n.isdecimal() and int(n) for n in COUNTS.value):
        raise refused("--counts", ",".join(COUNTS.value), "positive integers")
    counts = sorted({int(n) for n in COUNTS.value})
    if not 2 <= counts[-1] <= jax.device_count():
        raise refused("--counts", counts[-1], f"2 to {jax.device_count()} devices; --devices gives more on a CPU")
    for by in SELECT.value:
        check("--selections", by, one_of(SELECTIONS))
    if capacity % counts[-1]:
        raise refused("buffer.capacity", capacity, f"a multiple of {counts[-1]}, the number of devices")
    return counts


if __name__ == "__main__":
    cli.run(main)
