"""The device mesh, its shardings, and the way from host arrays to global arrays.

A mesh has three axes over every device of every process. Rows, of batches and of the buffer, are split along two of them
together, `AXIS` = (`DATA`, `FSDP`), which every program handles itself, device by device. Weights are split along `FSDP` and
`MODEL`, see `jaxcl.partition`; what is computed along `MODEL` the compiler divides. Where the last two have one place, as they
have unless a config says otherwise, training is data-parallel, and weights are whole on every device.

What is replicated carries the spec `P()`, what is sharded by rows `P(AXIS)`.
"""

import contextlib
import errno
import functools
import ipaddress
import json
import math
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcl.errors import PEER_LOST, PeerLost, UserError
from jaxcl.types import PyTree

Axis = str | tuple[str, ...]  # one axis of a mesh, or several that together number the devices
DATA, FSDP, MODEL = "data", "fsdp", "model"
AXIS = (DATA, FSDP)
WHOLE = PartitionSpec()  # every device holds it whole
ROWS = PartitionSpec(AXIS)  # split over the devices along its leading axis


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


def join_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = 100,
    start_seconds: float | None = None,
) -> None:
    """Makes this process one of several that train together, and returns when all have met.

    Must run before the first JAX computation, and after `use_fake_devices`.

    Args:
      coordinator: HOST:PORT of process 0, as all processes reach it. Process 0 listens at this address alone if HOST is a
        number or localhost; if it is a name, which may mean another address there, at all of its machine. With None for all
        three, JAX finds out on a Cloud TPU pod, under SLURM, Open MPI and (with the package `kubernetes`) in an indexed job of
        Kubernetes.
      num_processes, process_id: how many, and which of 0..num_processes-1 this is.
      heartbeat_seconds: how long the others wait for a process that sends no sign of life before they end.
      start_seconds: how long to wait for the others to come; None or 0: for ever. This process then ends, as `within` says.

    Raises:
      UserError: an argument is missing or out of range, process 0 cannot listen there, or nothing was found out.
      PeerLost: another process died meanwhile.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(
            f"--{missing[0]}: missing; give all of {', '.join('--' + name for name in given)}, or --distributed"
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise UserError(f"--process_id: {process_id} is not allowed, give 0 to num_processes - 1 = {num_processes - 1}")
    address = re.fullmatch(r"\S+:([0-9]{1,5})", coordinator or "")
    if coordinator is not None and not (address and 1 <= int(address[1]) <= 65535):
        raise UserError(f"--coordinator: {coordinator!r} is not allowed, give HOST:PORT with a port from 1 to 65535")
    if heartbeat_seconds < 1:
        raise UserError(f"--heartbeat_seconds: {heartbeat_seconds} is not allowed, give at least 1")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of the CPU backend alone
    jax.config.update("jax_enable_preemption_service", False)  # its handler of SIGTERM would replace ours
    who = "this process" if process_id is None else f"process {process_id} of {num_processes}"
    problem = f"{who}: not all processes were started and met within {start_seconds or 0:g} s"
    listen = None if coordinator is None or process_id else _listening_address(coordinator)
    try:
        with within(start_seconds, problem):
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                heartbeat_timeout_seconds=heartbeat_seconds,
                # Its end would be an abort with a native trace: later than ours.
                initialization_timeout=int(min(start_seconds or 10**6, 10**6)) + 60,
                coordinator_bind_address=listen,
            )
            jax.devices()  # the processes tell each other of theirs
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        if "UNAVAILABLE" in text or "DEADLINE_EXCEEDED" in text:
            raise PeerLost(f"{who}: another process has died: {text}; start the run again") from error
        flag = "--distributed" if missing else "--coordinator"
        raise UserError(f"{flag}: the processes cannot be joined: {text}") from error


def _listening_address(coordinator: str) -> str | None:
    """What process 0 binds, None for every address of this machine; found free, since JAX crashes where it is not.

    Raises:
      UserError: another program listens there, or it is no address of this machine.
    """
    name, _, port = coordinator.rpartition(":")
    host: str | None = name.strip("[]")
    if host != "localhost":
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            host = None
    problems = []
    places = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, place in places:
        try:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # just closed is free
                trial.bind(place)
        except OSError as error:
            problems.append(error)
    in_use = [error for error in problems if error.errno == errno.EADDRINUSE]
    if in_use or len(problems) == len(places):  # one family may be missing
        why = (in_use or problems)[0].strerror
        raise UserError(
            f"--coordinator: process 0 cannot listen at {coordinator}: {why}; give an address and a free port of its machine"
        )
    return coordinator if host else None


@contextlib.contextmanager
def within(seconds: float | None, problem: str) -> Iterator[None]:
    """What is done within waits for other processes. If it takes longer, this process ends by `end_lost`, since nothing in it
    can end such a wait. None or 0: for ever."""
    timer = threading.Timer(seconds or 0, end_lost, [problem])
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_lost(problem: str) -> NoReturn:
    """Ends this process, one of several, with one line and the status of `PeerLost`."""
    print(
        f"error: {problem}; another process has died or hangs (see its log). "
        "Start the run again to continue from its last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(PEER_LOST)


def from_first(call: Callable[[], Any], start_seconds: float | None = None) -> Any:
    """What `call` returns on process 0, as JSON gives it back, on every process; every process must take part.

    Args:
      start_seconds: how long the processes wait for each other to begin, and then for what process 0 found, see `within`.

    Raises:
      UserError: that of process 0, on every process.
    """
    if jax.process_count() == 1:
        return call()
    who = f"process {jax.process_index()} of {jax.process_count()}"
    with within(start_seconds, f"{who}: not all processes were ready to train within {start_seconds or 0:g} s"):
        multihost_utils.sync_global_devices("from_first")
    text = b""
    if jax.process_index() == 0:
        try:
            text = json.dumps({"value": call()}).encode()
        except UserError as error:
            text = json.dumps({"error": str(error)}).encode()
    with within(start_seconds, f"{who}: the run was not opened within {start_seconds or 0:g} s"):
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
        mine = np.frombuffer(text.ljust(size), np.uint8)
        found = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(mine)).astype(np.uint8).tobytes())
    if "error" in found:
        raise UserError(found["error"])
    return found["value"]


def make_mesh(devices: Sequence[jax.Device] | None = None, *, data: int = 0, fsdp: int = 1, model: int = 1) -> Mesh:
    """A mesh over `devices` (default: all devices of all processes).

    Args:
      data, fsdp, model: places along each axis; data = 0: what the others leave. Neighbours along `model` are neighbours among
        the devices, and so within a host.

    Raises:
      UserError: see `shape_of`, or devices that share their rows belong to several processes, each of which reads its own.
    """
    devices = jax.devices() if devices is None else devices
    placed = np.asarray(devices).reshape(shape_of(len(devices), data, fsdp, model))
    for row in placed.reshape(-1, model):
        if len({device.process_index for device in row}) > 1:
            here = sum(device.process_index == row[0].process_index for device in devices)
            raise UserError(f"mesh.model: {model} is not allowed, give a divisor of the {here} devices of a process")
    # jax.make_mesh would give Explicit axes; shard_map over ordinary arrays wants Auto.
    return Mesh(placed, (*AXIS, MODEL), axis_types=(AxisType.Auto,) * 3)


def shape_of(devices: int, data: int = 0, fsdp: int = 1, model: int = 1) -> tuple[int, int, int]:
    """Places along the axes of a mesh of so many devices, see `make_mesh`.

    Raises:
      UserError: they do not multiply to the devices.
    """
    found = (data or devices // (fsdp * model), fsdp, model)
    if math.prod(found) != devices:
        what = "data * fsdp * model" if data else "fsdp * model"
        shape = " x ".join(map(str, found if data else found[1:]))
        allowed = f"sizes that multiply to the {devices} devices" if data else f"a divisor of the {devices} devices"
        raise UserError(f"mesh: {what} = {shape} is not allowed, give {allowed}")
    return found


def row_shards(mesh: Mesh) -> int:
    """How many parts rows are split into."""
    return axis_size(mesh, AXIS)


def names_of(axis: Axis) -> tuple[str, ...]:
    """The names of an axis that may be several."""
    return (axis,) if isinstance(axis, str) else axis


def axis_size(mesh: Mesh, axis: Axis) -> int:
    """The number of places along an axis, or along several together."""
    return math.prod(mesh.shape[name] for name in names_of(axis))


def places(mesh: Mesh, axis: Axis) -> dict[jax.Device, int]:
    """The place of each device along an axis, or along several together, of which the last runs fastest."""
    along = [mesh.axis_names.index(name) for name in names_of(axis)]
    shape = [mesh.devices.shape[i] for i in along]
    return {
        device: int(np.ravel_multi_index([place[i] for i in along], shape))
        for place, device in np.ndenumerate(mesh.devices)
    }


def varying(axis: Axis | None, tree: PyTree) -> PyTree:
    """Tells `shard_map` with `check_vma`, which cannot know, that the arrays may differ along the axis. No operation."""

    def cast(x: jax.Array, name: str) -> jax.Array:
        try:
            return lax.pcast(x, name, to="varying")
        except ValueError:  # known already
            return x

    for name in names_of(axis or ()):
        tree = jax.tree.map(functools.partial(cast, name=name), tree)
    return tree


EXACT = 2**24  # float32 holds every integer up to here


def sum_counts(axis: Axis, counts: jax.Array, most: int) -> jax.Array:
    """The sum of counts int32 over the devices along an axis; it is at most `most`.

    As float32 where that is exact: XLA joins all-reduces of one type that do not wait for each other, so that the counts travel
    with what else is summed, above all with the gradients.
    """
    if most > EXACT:
        return lax.psum(counts, axis)
    return lax.psum(counts.astype(jnp.float32), axis).astype(jnp.int32)


def gather_counts(axis: Axis, counts: jax.Array, most: int) -> jax.Array:
    """Counts int32 `[...]`, each at most `most`, of all devices along an axis, `[N, ...]`, by `sum_counts`."""
    mine = jnp.zeros((lax.axis_size(axis), *counts.shape), jnp.int32).at[lax.axis_index(axis)].set(counts)
    return varying(axis, sum_counts(axis, mine, most))


def over_mesh(
    mesh: Mesh, function: Callable, in_specs: PyTree, out_specs: PyTree, auto: Sequence[str] = ()
) -> Callable:
    """`function` of one device's parts, made one of global arrays: under `shard_map`, not jitted.

    Replication is not checked (`check_vma`): gradients are summed over the axis by hand. A mesh with explicit axes wants its
    arguments as the specs say; there they are brought to it.

    Args:
      auto: axes that are left to the compiler: along them `function` sees whole arrays.
    """
    specs = [of_specs(lambda spec: without(spec, auto), x) if auto else x for x in (in_specs, out_specs)]
    manual = {"axis_names": frozenset(mesh.axis_names) - set(auto)} if auto else {}
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False, **manual)
    if AxisType.Explicit not in mesh.axis_types:
        return mapped

    def placed(spec: PartitionSpec, arg: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(mesh, spec)), arg)

    return lambda *args: mapped(*jax.tree.map(placed, in_specs, args))


def on_mesh(
    mesh: Mesh, function: Callable, in_specs: PyTree, out_specs: PyTree, *, donate: int | tuple[int, ...] = ()
) -> Any:
    """As `over_mesh`, jitted, and `MODEL` left to the compiler, which lays the results out as their specs say; `donate` numbers
    the arguments whose memory the results may take."""
    if mesh.shape.get(MODEL, 1) == 1:
        return jax.jit(over_mesh(mesh, function, in_specs, out_specs), donate_argnums=donate)
    mapped = over_mesh(mesh, function, in_specs, out_specs, (MODEL,))
    return jax.jit(mapped, donate_argnums=donate, out_shardings=shardings(mesh, out_specs))


def over_model(function: Callable[[jax.Array], jax.Array], x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`function(x)` within a program of `on_mesh`, on each device's part along `MODEL` as `spec` has it: for a collective along
    another axis, for which the compiler would bring the parts together."""
    spec = without(spec, AXIS)
    if all(name is None for name in spec):
        return function(x)
    return jax.shard_map(function, in_specs=spec, out_specs=spec, axis_names={MODEL}, check_vma=False)(x)


def without(spec: PartitionSpec, axes: Sequence[str]) -> PartitionSpec:
    """The spec with these axes taken out."""

    def kept(entry: Any) -> Any:
        names = tuple(name for name in names_of(entry or ()) if name not in axes)
        return names if len(names) > 1 else names[0] if names else None

    return PartitionSpec(*map(kept, spec))


def of_specs(function: Callable[..., Any], specs: PyTree, *rest: PyTree) -> PyTree:
    """`function` of every spec of a tree of them, and of what there is of it in the others."""
    return jax.tree.map(function, specs, *rest, is_leaf=lambda x: isinstance(x, PartitionSpec))


def shardings(mesh: Mesh, specs: PyTree) -> PyTree:
    """The shardings of a tree of specs."""
    return of_specs(lambda spec: NamedSharding(mesh, spec), specs)


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


def split_rows(mesh: Mesh, tree: PyTree) -> PyTree:
    """The same whole host arrays on every process -> global arrays split over the mesh by rows."""
    sharding = by_rows(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda rows: x[rows]), tree)


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
    """The same host values on every process -> global arrays held whole by every device."""
    return jax.device_put(tree, replicated(mesh))
