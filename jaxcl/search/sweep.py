"""Choosing hyper-parameters: settings of a grid, or drawn at random, several seeds each, compared on validation data.

The choice sees the training set alone: every run of it holds out `validation` of each class's train rows, which stand in for
the test set. The setting chosen is then trained once more on all train rows and evaluated on the test set; that row is the
only one of a sweep that has seen it. Random search: Bergstra & Bengio 2012.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import jaxcl
from jaxcl import marks, summaries
from jaxcl.check import NOT_NEGATIVE, POSITIVE, Rule, between, is_number, one_of, refused
from jaxcl.errors import Diverged, UserError
from jaxcl.fields import Field
from jaxcl.runs import files
from jaxcl.runs.progress import Runs, Shown
from jaxcl.search.seeds import check_folders, check_seeds, train_seeds
from jaxcl.training.build import build

Setting = dict[str, Any]  # config field, with dots -> value
SWEEP = "sweep.json"
SEARCHES, METRICS = ("grid", "random"), ("average_accuracy", "average_incremental_accuracy")
MOST = 10_000  # settings of a sweep
_OURS = ("seed", "data.validation")  # fields that the sweep itself sets
_ALLOWED = {
    "search": Field("", "", one_of(SEARCHES)),
    "trials": Field(0, "", between(1, MOST)),
    "trials_seed": Field(0, "", NOT_NEGATIVE),
    "seeds": Field(0, "", POSITIVE),
    "validation": Field(0.0, "", Rule(lambda x: 0 < x < 1, "a share between 0 and 1")),
    "metric": Field("", "", one_of(METRICS)),
}


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high` for a random search, uniform, or uniform in their logarithm; 4 significant digits."""

    low: float
    high: float
    log: bool = False

    def draw(self, rng: np.random.Generator) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        found = rng.uniform(low, high)
        return float(f"{math.exp(found) if self.log else found:.4g}")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What `get_sweep()` of a config file returns.

    Attributes:
      fields: config field, with dots as on the command line -> the values it may take, or, in a random search, a `Range`.
      search: "grid", every combination, the last field running fastest; or "random", `trials` settings.
      trials: of "random". The first n are the same however many follow; a setting that is drawn again counts once.
      trials_seed: of "random".
      seeds: runs of each setting, with seeds from config.seed upwards.
      validation: the share of each class's train rows that the choice is made on, in (0, 1).
      metric: what is largest for the setting chosen, the mean over seeds of one of `METRICS`.
    """

    fields: Mapping[str, Sequence[Any] | Range]
    search: str = "grid"
    trials: int = 10
    trials_seed: int = 0
    seeds: int = 1
    validation: float = 0.1
    metric: str = "average_accuracy"

    def settings(self) -> list[Setting]:
        """The settings to compare.

        Raises:
          UserError: a field of the sweep is not allowed.
        """
        for name, allowed in _ALLOWED.items():
            allowed.check(f"sweep.{name}", getattr(self, name))
        if not isinstance(self.fields, Mapping) or not self.fields:
            raise refused("sweep.fields", self.fields, "at least one config field and its values, as a dict")
        for field, values in self.fields.items():
            _check_values(field, values, self.search)
        if self.search == "grid":
            lists: Any = self.fields.values()
            if (count := math.prod(map(len, lists))) > MOST:
                raise UserError(f"sweep.fields: a grid of {count} settings is not allowed, give at most {MOST}")
            return [dict(zip(self.fields, values, strict=True)) for values in itertools.product(*lists)]
        found: list[Setting] = []
        for trial in range(self.trials):
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.trials_seed, trial))))
            setting = {
                field: values.draw(rng) if isinstance(values, Range) else values[int(rng.integers(len(values)))]
                for field, values in self.fields.items()
            }
            found += [setting] if setting not in found else []
        return found


def _check_values(field: Any, values: Any, search: str) -> None:
    if not isinstance(field, str):
        raise refused("sweep.fields", field, "names of config fields")
    if field in _OURS:
        raise UserError(f"sweep.fields: {field} is not allowed, the sweep sets it")
    if isinstance(values, Range):
        if search == "grid":
            raise UserError(
                f"sweep.fields: {field} has a Range, which is not allowed with search = grid; list its values"
            )
        wide = is_number(values.low) and is_number(values.high) and values.low < values.high
        if not wide or (values.log and values.low <= 0):
            raise UserError(f"sweep.fields: {field} = {values} is not allowed, give low < high, with log both above 0")
    elif isinstance(values, str | bytes) or not isinstance(values, Sequence) or not values:
        raise UserError(f"sweep.fields: {field} = {values!r} is not allowed, give a list of values or a Range")


def configure(config: ConfigDict, setting: Setting, seed: int, validation: float) -> ConfigDict:
    """The config of one run.

    Raises:
      UserError: a field does not exist or takes values of another type.
    """
    one = config.copy_and_resolve_references()
    try:
        with one.unlocked():  # a field that is new is then found, with the nearest name, by check_config
            one.update_from_flattened_dict(setting)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"sweep.fields: {error.args[0] if error.args else error}") from None
    one.seed, one.data.validation = seed, validation
    return one


def folder_name(setting: Setting) -> str:
    """A setting as the name of a folder: a sweep that is extended finds the runs it has."""
    name = re.sub(r"[^\w.,=+-]+", "_", ",".join(f"{field}={value}" for field, value in setting.items()))
    return name if len(name) <= 120 else f"{name[:110]}-{zlib.crc32(name.encode()):08x}"


def run_sweep(
    config: ConfigDict,
    sweep: Sweep,
    workdir: str | pathlib.Path,
    *,
    together: bool = False,
    devices: Sequence[jax.Device] | None = None,
    progress: Shown = True,
    **options: Any,
) -> dict[str, Any]:
    """Runs every setting on validation data, then the best one on the test set; leaves sweep.json in `workdir`.

    Every run is an ordinary run folder, `workdir/validation/SETTING/seed_S` or `workdir/test/SETTING/seed_S`: finished ones are
    not run again, unfinished ones are continued. A setting of which a run diverges is not chosen.

    Args:
      config: of all runs, but for what the sweep sets.
      together, devices, options: see `train_seeds`.

    Returns:
      What sweep.json holds: the settings in order, each with `values` (one a seed), `mean` and `deviation` of the metric on
      the validation rows, or with `diverged`, why it has none; `chosen`, the fields of the best; and `test`, its values on the
      test set after training on all train rows.

    Raises:
      UserError: before anything runs, if the sweep or the config of any setting is wrong, or there is something of
        someone else in the place of sweep.json or of a run.
      Diverged: every setting did, or the one chosen, on all train rows.
    """
    workdir = pathlib.Path(workdir)
    marks.check_ours("workdir", workdir / SWEEP)
    settings, seeds = sweep.settings(), range(config.seed, config.seed + sweep.seeds)
    _check_all(config, sweep, settings, together, devices)

    shares = {"validation": sweep.validation, "test": 0.0}

    def runs_of(setting: Setting, kind: str) -> tuple[ConfigDict, dict[int, pathlib.Path]]:
        """The config of a setting's runs, and their folders by seed."""
        place = workdir / kind / folder_name(setting)
        return configure(config, setting, config.seed, shares[kind]), {seed: place / f"seed_{seed}" for seed in seeds}

    for kind, setting in itertools.product(shares, settings):
        check_folders(*runs_of(setting, kind), options.get("overwrite", False))

    number = Runs((len(settings) + 1) * len(seeds))

    def measure(setting: Setting, kind: str) -> dict[str, Any]:
        """The metric of a setting's runs, one a seed."""
        number.setting = ", ".join(f"{field}={value}" for field, value in setting.items())
        shown: Shown = number if progress else False
        found = train_seeds(*runs_of(setting, kind), together=together, devices=devices, progress=shown, **options)
        each = [result[sweep.metric] for result in found]
        mean, deviation = summaries.mean_and_deviation(each)
        place = f"{kind}/{folder_name(setting)}"
        return {"fields": setting, "folder": place, "values": each, "mean": mean, "deviation": deviation}

    rows = []
    for setting in settings:
        try:
            rows.append(measure(setting, "validation"))
        except Diverged as error:
            rows.append({"fields": setting, "diverged": str(error)})
    best = max((row for row in rows if "mean" in row), key=lambda row: row["mean"], default=None)
    if best is None:
        raise Diverged(f"sweep: all {len(rows)} settings diverged; the first: {rows[0]['diverged']}")
    result = {
        marks.JSON: jaxcl.__version__,
        "name": config.name,
        "strategy": config.strategy,
        "search": sweep.search,
        "metric": sweep.metric,
        "seeds": list(seeds),
        "validation": sweep.validation,
        "settings": rows,
        "chosen": best["fields"],
        "test": measure(best["fields"], "test"),
    }
    result = json.loads(json.dumps(result))
    if jax.process_index() == 0:
        files.write_json(workdir / SWEEP, result)
    return result


def _check_all(
    config: ConfigDict, sweep: Sweep, settings: list[Setting], together: bool, devices: Sequence[jax.Device] | None
) -> None:
    """Checks the config of every run, without data, and then that of every setting with them."""
    count, seeds = len(jax.devices() if devices is None else devices), range(config.seed, config.seed + sweep.seeds)
    for validation, setting in itertools.product((sweep.validation, 0.0), settings):
        check_seeds(configure(config, setting, config.seed, validation), seeds, together, count)
    for setting in settings:
        build(configure(config, setting, config.seed, sweep.validation), devices)


def rows(found: dict[str, Any]) -> list[list[str]]:
    """What `run_sweep` returns as a table: the header, a row a setting, and last the one of the test set."""
    header = [*found["chosen"], "evaluated on", "seeds", f"{found['metric'].replace('_', ' ')} %", ""]
    share = f"validation ({100 * found['validation']:g} % of train)"
    last = _cells(found, found["test"], "test, trained on all train rows")
    return [header, *(_cells(found, row, share) for row in found["settings"]), last]


def _cells(found: dict[str, Any], row: dict[str, Any], data: str) -> list[str]:
    fields = [str(value) for value in row["fields"].values()]
    if "diverged" in row:
        return [*fields, data, str(len(found["seeds"])), "diverged", ""]
    spread = f" ± {100 * row['deviation']:.2f}" if len(row["values"]) > 1 else ""
    mark = "chosen" if row["fields"] == found["chosen"] else ""
    return [*fields, data, str(len(row["values"])), f"{100 * row['mean']:.2f}{spread}", mark]
