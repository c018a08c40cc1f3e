"""The device mesh, its shardings, and the way from host arrays to global arrays.

jaxcl is data-parallel: one mesh axis, `AXIS`, over every device of every process. What is replicated carries the spec
`P()`, what is sharded by rows `P(AXIS)`.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcl.errors import UserError

AXIS = "data"
PyTree = Any


def use_fake_devices(count: int) -> None:
    """Makes the CPU backend present `count` devices; must run before the first JAX computation.

    XLA's CPU collectives block a thread each: with fewer threads than devices a long queue of asynchronous steps starves and
    aborts, so the pool is sized to the devices (`NPROC`), not to the cores.

    Raises:
      UserError: if `count` is below one or the backend has already started with another number.
    """
    if count < 1:
        raise UserError(f"devices: {count} is not allowed, give at least 1")
    os.environ["NPROC"] = str(max(2 * count, os.cpu_count() or 1))
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise UserError(f"devices: {count} fake devices were asked for after JAX had started: {error}") from error


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh over `devices` (default: all devices of all processes)."""
    devices = jax.devices() if devices is None else devices
    # jax.make_mesh would give Explicit axes; shard_map over ordinary arrays wants Auto.
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The sharding of what is split over the devices along its leading axis."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def shard_rows(mesh: Mesh, local: PyTree) -> PyTree:
    """Host arrays holding this process's contiguous rows -> global arrays split over the mesh by rows."""
    sharding = by_rows(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
    """The same host values on every process -> global arrays held whole by every device."""
    return jax.device_put(tree, replicated(mesh))
