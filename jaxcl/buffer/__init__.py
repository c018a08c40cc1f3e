"""The rehearsal buffer: a memory of past rows, sharded over devices, from which all draw without bias.

    buffer = make_buffer(record, capacity=2000, representatives=56, policy="reservoir", mesh=mesh)
    state = buffer.init()
    state = buffer.insert(state, rows, key)      # jit it, donate the state
    drawn = buffer.draw(state, key)              # after the insert: the other order copies the whole buffer
    buffer.save(state, "folder")                 # files for NumPy; `load` takes them onto any number of devices
    state = buffer.remove(state, ids)            # a person's right to be forgotten

`buffer.py` has the functions; `make.py` binds them to their sizes. Idea: Bouvier et al., Efficient Data-Parallel Continual
Learning with Asynchronous Distributed Rehearsal Buffers, CCGrid 2024.
"""

from jaxcl.buffer.buffer import DRAWS, MEMORIES, SAMPLINGS, Staged
from jaxcl.buffer.exchange import EXCHANGES
from jaxcl.buffer.host import HANDOVERS
from jaxcl.buffer.make import TIERS, Buffer, make_buffer
from jaxcl.buffer.mixture import Mixture, make_mixture
from jaxcl.buffer.policy import POLICIES
from jaxcl.buffer.remove import forget
from jaxcl.buffer.repeats import REPEATS
from jaxcl.buffer.shard import Drawn, Rows, Shard

__all__ = [
    "DRAWS",
    "EXCHANGES",
    "HANDOVERS",
    "MEMORIES",
    "POLICIES",
    "REPEATS",
    "SAMPLINGS",
    "TIERS",
    "Buffer",
    "Drawn",
    "Mixture",
    "Rows",
    "Shard",
    "Staged",
    "forget",
    "make_buffer",
    "make_mixture",
]
