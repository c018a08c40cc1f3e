"""What all figures share: how they vary a config, and the folder of its recorded runs, in which each is run only once."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.search.seeds import train_seeds
from jaxcl.search.sweep import folder_name
from jaxcl.training.config import check_config

Json = dict[str, Any]
Fields = dict[str, Any]  # config field, with dots -> value
STRATEGIES = {"from_scratch": "from scratch", "incremental": "incremental", "er": "rehearsal"}


@dataclasses.dataclass(frozen=True)
class Figures:
    """How the figures vary a config: what `get_figures()` of a config file returns, called with get_config's argument.

    Attributes:
      models: label -> fields changed, of figure 1; figure 2 takes the first.
      most_seeds: label -> seeds, of models that take too long for as many as --seeds.
      shares: of figures 2 and 5, of the training rows.
      representatives, candidates: of figure 2, over all devices; (): the config's own times 1, 2, 4, 8 and a half, 1, 2.
      new, drawn: of figure 3, rows a device and step.
      short: fields changed where only times are read, figures 3 and 4.
    """

    models: Mapping[str, Fields] = dataclasses.field(default_factory=dict)
    most_seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    shares: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    representatives: tuple[int, ...] = ()
    candidates: tuple[int, ...] = ()
    new: int = 56
    drawn: int = 7
    short: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"epochs": 1, "optimizer.warmup_epochs": 0.0, "optimizer.schedule": "constant"}
    )

    def only(self, models: Sequence[str]) -> "Figures":
        """The same with some of the models; all, if none is named.

        Raises:
          UserError: there is no such model.
        """
        for name in models:
            if name not in self.models:
                raise UserError(
                    f"--models: {name!r} is unknown, choose of {', '.join(self.models) or 'none: give no --models'}"
                )
        return dataclasses.replace(self, models={name: self.models[name] for name in models or self.models})


@dataclasses.dataclass(frozen=True)
class Study:
    """A config, how it is varied, and where its runs are recorded.

    Attributes:
      seeds: of every run, from config.seed upwards.
      devices: to run on; default all.
      options: of `train_seeds`.
    """

    config: ConfigDict
    figures: Figures
    workdir: pathlib.Path
    seeds: int = 1
    devices: Sequence[jax.Device] = dataclasses.field(default_factory=jax.devices)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _found: dict[tuple[str, tuple[int, ...]], list[Json]] = dataclasses.field(default_factory=dict, init=False)

    @property
    def models(self) -> Mapping[str, Fields]:
        return self.figures.models or {self.config.model.name: {}}

    def configured(self, model: str, strategy: str, fields: Fields | None = None) -> ConfigDict:
        one = changed(self.config, {**self.models[model], **(fields or {})})
        one.strategy = strategy
        return one

    def runs(self, model: str, strategy: str, fields: Fields | None = None) -> list[Json]:
        """What result.json of each seed holds; those that are finished are read, an unfinished one is continued.

        Folders are WORKDIR/runs/MODEL/STRATEGY,FIELD=VALUE,.../seed_S, without the fields that change nothing: so all figures
        share their runs.
        """
        own = self.configured(model, strategy)
        new = {name: value for name, value in (fields or {}).items() if get(own, name) != value}
        place = f"runs/{model}/" + ",".join([strategy, *([folder_name(new)] if new else [])])
        seeds = min(self.seeds, self.figures.most_seeds.get(model, self.seeds))
        return self.train(self.configured(model, strategy, new), place, seeds)

    def train(self, config: ConfigDict, place: str, seeds: int | None = None) -> list[Json]:
        """The results of a config's seeds, in folders WORKDIR/place/seed_S."""
        numbers = tuple(range(config.seed, config.seed + (seeds or self.seeds)))
        folders = {seed: self.workdir / place / f"seed_{seed}" for seed in numbers}
        key = (place, numbers)
        if key not in self._found:  # or --overwrite would train what figures share for each of them
            self._found[key] = train_seeds(config, folders, together=False, devices=self.devices, **self.options)
        return self._found[key]

    def check(self) -> None:
        """That every run of figures 1 and 2 can be built, before the first of them.

        Raises:
          UserError: one cannot.
        """
        for model in self.models:
            for strategy in STRATEGIES:
                check_config(self.configured(model, strategy), len(self.devices))


def changed(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
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
    for name in path.split("."):
        if not isinstance(config, ConfigDict) or name not in config:
            raise UserError(f"config.{path}: no such field")
        config = config[name]
    return config
