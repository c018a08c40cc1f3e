"""Settings x seeds -> runs in folders -> records: what the studies and the figures of the paper are made of.

Each run has a folder of its own, WORKDIR/PLACE/seed_S. A finished run is read and an unfinished one is continued, so a study
can be interrupted, extended and drawn again.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments.bench.harness import environment
from experiments.pages.page import Json, as_json
from jaxcl import cli, report
from jaxcl.errors import UserError
from jaxcl.search.seeds import train_seeds

MODELS = flags.DEFINE_list("models", [], "of the models that a study knows by name; default all")
PEER_PYTHON = flags.DEFINE_string("peer_python", sys.executable, "interpreter that has PyTorch, for what runs beside")
ROWS = flags.DEFINE_list("rows", [], "of the rows that a study knows by name; default all")

ONE_BY_ONE = functools.partial(train_seeds, together=False)

Fields = Mapping[str, Any]  # config field, with dots -> value


class Setting(NamedTuple):
    """What is trained with every seed.

    Attributes:
      place: folder of its runs, below the workdir.
      fields: config fields that it changes.
      label: what its record says of it beside what its runs found.
      devices: how many it takes; None: those of the grid.
    """

    place: str
    fields: Fields
    label: Fields
    devices: int | None = None


@dataclasses.dataclass(frozen=True)
class Grid:
    """Runs of one config, each made once.

    Attributes:
      config: of all runs, but for what a setting changes.
      workdir: above the folders of the runs.
      seeds: runs of a setting, with seeds from config.seed upwards.
      devices: to run on; default all.
      train: as `train_seeds`; default one seed after the other.
      options: more arguments of `train`.
    """

    config: ConfigDict
    workdir: pathlib.Path
    seeds: int = 1
    devices: Sequence[jax.Device] = dataclasses.field(default_factory=jax.devices)
    train: Callable[..., list[Json]] = ONE_BY_ONE
    options: Fields = dataclasses.field(default_factory=dict)
    _found: dict[tuple[str, tuple[int, ...]], list[Json]] = dataclasses.field(default_factory=dict, init=False)

    def runs(self, place: str, fields: Fields, *, seeds: int | None = None, devices: int | None = None) -> list[Json]:
        """What result.json holds, for each of `seeds` seeds of one setting, on the first `devices` devices.

        Raises:
          UserError: a field does not exist.
        """
        config = changed(self.config, fields)
        numbers = tuple(range(config.seed, config.seed + (seeds or self.seeds)))
        key = (place, numbers)
        if key not in self._found:  # with --overwrite, settings that share runs would train them again
            folders = {seed: self.workdir / place / f"seed_{seed}" for seed in numbers}
            some = self.devices[:devices]
            self._found[key] = self.train(config, folders, devices=some, **self.options)
        return self._found[key]

    def records(
        self,
        settings: Iterable[Setting],
        read: Callable[[list[Json]], Json],
        say: Callable[[Json], str] = lambda record: report.spread(record["average_accuracy"]) + " %",
    ) -> list[Json]:
        """A record a setting: its label and what `read` finds in its runs. `say` is what is printed of a record."""
        settings, found, begin = list(settings), [], time.perf_counter()
        for number, one in enumerate(settings, start=1):
            found.append({**one.label, **read(self.runs(one.place, one.fields, devices=one.devices))})
            seconds = time.perf_counter() - begin
            print(f"{number} of {len(settings)}, {seconds:.0f} s: {one.place}: {say(found[-1])}", flush=True)
        return found


def from_flags(seeds: int, least: int = 1, **fields: Any) -> Grid:
    """The grid of --config, --workdir, --seeds, --overwrite and --stall_seconds, with more `fields` of `Grid`.

    Raises:
      UserError: a flag is missing, or --seeds is below `least`.
    """
    options = cli.run_options() | fields.pop("options", {})
    config, workdir = cli.config_and_workdir()
    return Grid(config, workdir, cli.seeds(seeds, least), options=options, **fields)


def changed(config: ConfigDict, fields: Fields) -> ConfigDict:
    """A copy with other values; a group of fields is replaced as a whole.

    Raises:
      UserError: a field does not exist.
    """
    one = config.copy_and_resolve_references()
    for path, value in fields.items():
        get(one, path)  # or there is no such field
        *groups, name = path.split(".")
        group = get(one, ".".join(groups)) if groups else one
        with group.unlocked(), group.ignore_type():
            group[name] = ConfigDict(value) if isinstance(value, Mapping) else value
    return one


def get(config: ConfigDict, path: str) -> Any:
    """The value of a field, given with dots.

    Raises:
      UserError: it does not exist.
    """
    for name in path.split("."):
        if not isinstance(config, ConfigDict) or name not in config:
            raise UserError(f"config.{path}: no such field")
        config = config[name]
    return config


def each(runs: Sequence[Json], *names: str) -> Json:
    """A list a name: what each run's result holds under it."""
    return {name: [run[name] for run in runs] for name in names}


def write(path: str | pathlib.Path, found: Json, picture: Callable[[Json], Figure] | None = None) -> None:
    """Writes a result file, what was found and where, and a picture of it beside it. Makes their folder."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json({**found, **environment()}))
    if picture is not None:
        path.with_suffix(".png").write_bytes(report.png(functools.partial(picture, found)))
    print(f"wrote {path}")
