"""The mesh of a run and how its weights lie on it, from the config: fields, checks, the layout."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxcl import mesh as mesh_lib
from jaxcl.check import Rule, between, each, refused
from jaxcl.fields import Field
from jaxcl.models import Model
from jaxcl.optimizer import make_optimizer
from jaxcl.partition import AXES, Layout, Split, make_layout
from jaxcl.strategies import Strategy
from jaxcl.strategies.base import one_pass
from jaxcl.types import PyTree

MOST = 2**20  # devices


def _divides(x: Any) -> bool:
    """Whether it is a rule, see `partition.Split`."""
    if not isinstance(x, list | tuple) or len(x) != 2 or not isinstance(x[1], list | tuple):
        return False
    try:
        re.compile(x[0])
    except (re.error, TypeError):
        return False
    return all(axis is None or axis in AXES for axis in x[1])


MESH = {
    "data": Field(0, "devices along which rows alone are split; 0: what fsdp and model leave", between(0, MOST)),
    "fsdp": Field(1, "devices along which rows are split, and weights with all that is like them", between(1, MOST)),
    "model": Field(1, "devices along which weights alone are split, and the computation", between(1, MOST)),
    "rules": Field(
        (),
        "how weights are split, before the rules of the model: see docs/scale.md",
        each(Rule(_divides, f"a pattern and a list of {', '.join(AXES)} or None")),
    ),
}


def mesh_of(config: ConfigDict, devices: Sequence[jax.Device] | None) -> jax.sharding.Mesh:
    """The mesh of a run.

    Raises:
      UserError: see `make_mesh`.
    """
    return mesh_lib.make_mesh(devices, **_sizes(config))


def shards_of(config: ConfigDict, devices: int) -> int:
    """Parts that rows are split into on so many devices.

    Raises:
      UserError: see `mesh.shape_of`.
    """
    data, fsdp, _ = mesh_lib.shape_of(devices, **_sizes(config))
    return data * fsdp


def _sizes(config: ConfigDict) -> dict[str, int]:
    return {name: config.mesh[name] for name in (mesh_lib.DATA, mesh_lib.FSDP, mesh_lib.MODEL)}


def check_parts(config: ConfigDict, strategy: Strategy, shards: int) -> None:
    """Whether a step can be taken with parts of a device's rows, and with parts of the weights.

    Raises:
      UserError: it cannot.
    """
    drawn = strategy.draws * config.buffer.representatives if config.buffer.replay == "draw" else 0
    each_pass = [config.batch_size + drawn] if strategy.gradients is one_pass else [config.batch_size, drawn]
    for rows in each_pass:
        if rows // shards % config.microbatches:
            raise refused("microbatches", config.microbatches, f"a divisor of the {rows // shards} rows of a device")
    if config.mesh.fsdp > 1 and strategy.gradients is not one_pass and not strategy.by_parts:
        raise refused("mesh.fsdp", config.mesh.fsdp, f"1 with {config.strategy}, whose gradients need whole weights")


def layout_of(
    config: ConfigDict, mesh: jax.sharding.Mesh, model: Model, strategy: Strategy, image_shape: tuple[int, int, int]
) -> Layout | None:
    """How the weights of a run lie on its mesh; None: whole on every device.

    Raises:
      UserError: see `make_layout`.
    """

    def new() -> tuple[PyTree, PyTree, PyTree]:
        variables = model.init(jax.random.key(0), image_shape)
        params = variables["params"]
        return params, make_optimizer(config.optimizer).init(params), strategy.init(params, variables["batch_stats"])

    options: Any = {"given": [Split(pattern, tuple(axes)) for pattern, axes in config.mesh.rules]}
    options |= {"split_state": config.optimizer.split_state, "remat": model.remat, "model": model.name}
    return make_layout(mesh, model.rules, *jax.eval_shape(new), **options)


def squares_of(layout: Layout | None) -> Callable[[PyTree], PyTree] | None:
    """See `make_optimizer`."""
    return None if layout is None else layout.squares
