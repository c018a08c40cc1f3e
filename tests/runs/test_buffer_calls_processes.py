"""Two processes of which each holds a copy of every shard, or shards of its own, draw what one process draws."""

import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tests.unit.test_buffer_mesh import batch, made

PROGRAM = textwrap.dedent("""
    import sys

    import jax
    import numpy as np

    from jaxcl import mesh as mesh_lib
    from tests.runs.test_buffer_calls_processes import ORDERS, course

    folder, address, me = sys.argv[1], sys.argv[2], int(sys.argv[3])
    mesh_lib.use_fake_devices(2)
    mesh_lib.join_processes(address, 2, me)
    for order in ORDERS:
        np.savez(f"{folder}/{order[0]}-{me}.npz", **course(order))
""")
ORDERS = (("model", "data"), ("data", "model"))  # the first axis is that of the processes


def course(order: tuple[str, str]) -> dict[str, np.ndarray]:
    """What the host tier draws on the first four devices, two by two, and stores; its bytes."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), order, axis_types=(AxisType.Auto,) * 2)
    buffer, rows = made(mesh, tier="host"), NamedSharding(mesh, PartitionSpec("data"))

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, rows, lambda part: x[part])

    state, found = buffer.init(), []
    for step in range(4):
        state, asked = buffer.ask(state, jax.tree.map(place, batch(step)), jax.random.key(step))
        found.append(buffer.collect(asked))
    found += [buffer.draw(state, jax.random.key(9)), state.id]
    leaves = [multihost_utils.process_allgather(x, tiled=True) for x in jax.tree.leaves(found)]
    return {"bytes": np.array(buffer.num_bytes)} | {str(i): np.asarray(x) for i, x in enumerate(leaves)}


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), address]
    processes = [
        subprocess.Popen([*command, str(me)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for me in (0, 1)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for order in ORDERS:
        wanted = course(order)
        for me in (0, 1):
            found = np.load(tmp_path / f"{order[0]}-{me}.npz")
            for name in wanted.keys() - {"bytes"}:
                np.testing.assert_array_equal(found[name], wanted[name])
            copies = found["bytes"] - wanted["bytes"]  # of the rows, on the host of the other process
            assert copies == (22 * 19 if order[0] == "model" else 0)
