"""What all figures share: how they vary a config, and the recorded runs that they read."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.pages.page import Json
from experiments.studies.grid import Fields, Grid, changed, get
from jaxcl import mesh as mesh_lib
from jaxcl.check import near
from jaxcl.errors import UserError
from jaxcl.search.sweep import folder_name
from jaxcl.training.batches import train_batches
from jaxcl.training.build import Parts, build
from jaxcl.training.config import check_config
from jaxcl.training.state import TrainState
from jaxcl.types import Batch

STRATEGIES = {"from_scratch": "from scratch", "incremental": "incremental", "er": "rehearsal"}
SHORT: Fields = {"epochs": 1, "optimizer.warmup_epochs": 0.0, "optimizer.schedule": "constant"}


@dataclasses.dataclass(frozen=True)
class Figures:
    """How the figures vary a config. `get_figures()` of a config file returns some of these, as a dict.

    Attributes:
      models: label -> fields changed, of figure 1; figure 2 takes the first. Default: the config's own.
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
    short: Fields = dataclasses.field(default_factory=lambda: SHORT)

    @classmethod
    def of(cls, fields: Mapping[str, Any], models: Sequence[str] = ()) -> "Figures":
        """Those of a config file, with some of its models; all, if none is named.

        Raises:
          UserError: there is no such field or model.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in names:
                raise UserError(f"get_figures(): {name}: no such field, {near(name, names)}")
        found = cls(**fields)
        for name in models:
            if name not in found.models:
                allowed = near(name, found.models) if found.models else "the config names none"
                raise UserError(f"--models: {name!r} is unknown, {allowed}")
        return dataclasses.replace(found, models={name: found.models[name] for name in models or found.models})


@dataclasses.dataclass(frozen=True)
class Study:
    """Recorded runs and how they are varied.

    Attributes:
      grid: its runs lie in WORKDIR/runs/MODEL/STRATEGY,FIELD=VALUE,.../seed_S.
    """

    grid: Grid
    figures: Figures

    @property
    def config(self) -> ConfigDict:
        return self.grid.config

    @property
    def devices(self) -> Sequence[jax.Device]:
        return self.grid.devices

    @property
    def models(self) -> Mapping[str, Fields]:
        return self.figures.models or {self.config.model.name: {}}

    @property
    def model(self) -> str:
        """The first, that of the figures with only one."""
        return next(iter(self.models))

    def fields(self, model: str, strategy: str, more: Fields | None = None) -> Fields:
        return {**self.models[model], **(more or {}), "strategy": strategy}

    def configured(self, model: str, strategy: str, more: Fields | None = None) -> ConfigDict:
        return changed(self.config, self.fields(model, strategy, more))

    def runs(self, model: str, strategy: str, more: Fields | None = None) -> list[Json]:
        """What result.json of each seed holds.

        Fields that change nothing are left out of the folder's name, so all figures share their runs.
        """
        own = self.configured(model, strategy)
        new = {name: value for name, value in (more or {}).items() if get(own, name) != value}
        place = f"runs/{model}/" + ",".join([strategy, *([folder_name(new)] if new else [])])
        seeds = min(self.grid.seeds, self.figures.most_seeds.get(model, self.grid.seeds))
        return self.grid.runs(place, self.fields(model, strategy, new), seeds=seeds)

    def check(self) -> None:
        """That every run of figure 1 can be built, before the first of them.

        Raises:
          UserError: one cannot.
        """
        for model in self.models:
            for strategy in STRATEGIES:
                check_config(self.configured(model, strategy), len(self.devices))


def begun(config: ConfigDict, devices: Sequence[jax.Device]) -> tuple[Parts, TrainState, Batch]:
    """A run before its first step: its parts, its state and its first batch on the devices."""
    run = build(config, devices)
    loader = train_batches(config, run, 0)
    assert loader is not None
    state = run.new_state(run.new_weights(jax.random.key(0)))
    return run, state, mesh_lib.shard_rows(run.mesh, loader[0])
