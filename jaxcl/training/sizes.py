"""Whether the arrays of a run can be held, told from their shapes before any of them is made.

What is counted is what a run cannot do without: its weights, batches and stored rows, but no activations. A run that is
refused could not begin; one that is not may still need more than there is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxcl.check import refused
from jaxcl.memory import free_memory
from jaxcl.mesh import row_shards
from jaxcl.partition import Layout, bytes_on_device
from jaxcl.types import PyTree

PIXEL = 5  # bytes of one as it arrives, uint8, and as the model reads it, float32


def check_tasks(tasks: Any, rows: int = 0) -> None:
    """Whether so many tasks (`data.tasks`) can be kept track of; a list of their classes always can.

    Args:
      rows: of the train and test data, where every task has all of them.

    Raises:
      UserError: they cannot.
    """
    if isinstance(tasks, int):  # the accuracy matrix; labels and numbers of the rows
        check_memory({"data.tasks": (tasks, 8 * tasks * tasks + 16 * tasks * rows)}, free_memory())


def check_steps(field: str, epochs: int, rows: Sequence[int], batch_size: int) -> None:
    """Whether the steps of a run can be counted, as int32.

    Args:
      epochs: the value of `field`.
      rows: of each task.

    Raises:
      UserError: they cannot.
    """
    steps = epochs * sum(-(-n // batch_size) for n in rows)
    if steps >= 2**31:
        raise refused(field, epochs, f"less: {steps} steps are too many to be counted")


def check_sizes(
    config: ConfigDict,
    mesh: Mesh,
    new_weights: Callable[[jax.Array], PyTree],
    image_shape: tuple[int, ...],
    *,
    record: PyTree = None,
    capacity: int = 0,
    draws: int = 0,
    seeds: int = 1,
    averaged: bool = False,
    own: PyTree = None,
    layout: Layout | None = None,
) -> None:
    """Whether the devices can hold the weights, the batches and the buffer of a run.

    Args:
      new_weights: see `make_weights`.
      record: shapes and dtypes of one stored row; None without a buffer.
      capacity: rows of the buffer, as `config.buffer` counts them.
      draws: of a step.
      seeds: runs that are trained together.
      averaged: whether an average of the weights is kept beside them.
      own: shapes and dtypes of the strategy's own state.
      layout: of the weights; None: whole on every device.

    Raises:
      UserError: they cannot; names the field that asks for most.
    """
    weights = jax.eval_shape(new_weights, jax.random.key(0))
    kept = bytes_of((weights, weights[:2] if averaged else None))
    if layout is not None:
        laid = (layout.params, weights[0]), (layout.opt_state, weights[2]), (layout.params, weights[0])
        kept = sum(bytes_on_device(mesh, *one) for one in laid[: 2 + averaged]) + (1 + averaged) * bytes_of(weights[1])
    buffer, devices = config.buffer, row_shards(mesh)
    row, stored = PIXEL * math.prod(image_shape), bytes_of(record)
    each = {
        "model.options": (config.model.options.to_dict(), kept),
        "strategy": (
            config.strategy,
            bytes_of(own) if layout is None else bytes_on_device(mesh, layout.strategy_state, own),
        ),
        "batch_size": (config.batch_size, config.batch_size // devices * row),
        "eval.batch_size": (config.eval.batch_size, config.eval.batch_size // devices * row),
        "buffer.representatives": (buffer.representatives, draws * buffer.representatives // devices * (stored + row)),
    }
    if buffer.tier == "device":
        field, asked = ("capacity", capacity) if buffer.share is None else ("share", buffer.share)
        rows = capacity // devices if buffer.memory == "sharded" else capacity
        each[f"buffer.{field}"] = (asked, rows * stored)
    check_on_devices({name: (value, seeds * need) for name, (value, need) in each.items()}, mesh)


def check_on_devices(parts: Mapping[str, tuple[Any, int]], mesh: Mesh) -> None:
    """As `check_memory`, of what each device has to hold; CPU devices share the memory of their process."""
    check_memory(parts, free_on_device(mesh), " on each device")


def free_on_device(mesh: Mesh) -> int:
    """Bytes that each device may hold."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return free_memory() // len(mesh.local_devices)
    return (device.memory_stats() or {}).get("bytes_limit", 2**63)


def check_memory(parts: Mapping[str, tuple[Any, int]], there: int, where: str = "") -> None:
    """Whether arrays fit: `parts` gives of a config field its value and the bytes that it asks for, `there` bytes are free.

    Raises:
      UserError: they do not; names the field that asks for most.
    """
    need = sum(size for _, size in parts.values())
    if need > there:
        field = max(parts, key=lambda name: parts[name][1])
        raise refused(
            field, parts[field][0], f"less: {need / 1e9:.4g} GB are needed and {there / 1e9:.4g} GB are free{where}"
        )


def bytes_of(tree: PyTree) -> int:
    """Of all arrays, or their shapes."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
