"""A memory of several processes: saved, loaded, asked and rid of rows as if there were one."""

import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import Rows, make_buffer
from tests import oracle

CAPACITY, ROWS = 22, 32
RECORD = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), oracle.record_of(np.arange(1)))
GONE = [3, 4, 30, 31]
PROGRAM = textwrap.dedent("""
    import sys

    import jax
    import numpy as np

    from jaxcl import mesh as mesh_lib
    from jaxcl.errors import UserError
    from tests.runs.test_buffer_processes import GONE, filled

    folder, address, me = sys.argv[1], sys.argv[2], int(sys.argv[3])
    mesh_lib.use_fake_devices(2)
    mesh_lib.join_processes(address, 2, me)
    buffer, state = filled(mesh_lib.make_mesh())
    buffer.save(state, folder + "/whole")
    try:
        buffer.save(state, folder + "/whole")
    except UserError as error:
        assert "overwrite=True" in str(error), error
    else:
        raise AssertionError("replaced")
    found = buffer.select(state, lambda record, label, ident: ident % 2 == 0)
    np.save(f"{folder}/even-{me}.npy", found.id)
    state = buffer.remove(state, GONE)
    buffer.save(state, folder + "/rest")
    again = buffer.load(folder + "/rest")
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
            np.testing.assert_array_equal(a.data, b.data)
    if me == 0:  # what one of them cannot read, none of them takes for read
        with open(f"{folder}/whole/shard-00000/record.image.npy", "ab") as file:
            file.write(b"more")
    mesh_lib.from_first(lambda: None)
    try:
        buffer.load(folder + "/whole")
    except UserError as error:
        print(f"{me}: {error}", flush=True)
""")


def filled(mesh):
    buffer = make_buffer(RECORD, capacity=CAPACITY, representatives=4, policy="fifo", mesh=mesh)
    ids = np.arange(ROWS, dtype=np.int32)
    rows = mesh_lib.split_rows(mesh, Rows(oracle.record_of(ids), ids % 4, ids))
    return buffer, jax.jit(buffer.insert)(buffer.init(), rows, jax.random.key(0))


@pytest.mark.slow
def test_two_processes_do_what_one_does(mesh_of, tmp_path):
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
    assert "record.image.npy is damaged" in said[0] and "another process could not read" in said[1], said

    buffer, state = filled(mesh_of(4))
    even = np.concatenate([np.load(tmp_path / f"even-{me}.npy") for me in (0, 1)])
    np.testing.assert_array_equal(even, buffer.select(state, lambda record, label, ident: ident % 2 == 0).id)
    removed, found = buffer.remove(state, GONE), buffer.load(tmp_path / "rest")
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(removed), strict=True):
        np.testing.assert_array_equal(x, y)
