"""Insert and draw inside a scan of 100 steps, where no step is dispatched: jaxcl's buffer beside flashbax's, and Mammoth's.

    python -m experiments.bench.buffer_scan --peer_python=PEERS_ENV/bin/python --mammoth=MAMMOTH_CHECKOUT
        --json=experiments/results/bench_buffer_scan.json

As in `experiments.bench.buffer`: each in a process of its own with a full buffer on one device, two taking turns. Flashbax's is
a ring that stores every row, as jaxcl's does by the policy fifo; a full reservoir stores ever fewer. Mammoth's is a reservoir,
and its step is a call, without a scan.
"""

import dataclasses
import shutil
import sys
from typing import Annotated

from experiments.bench import harness
from experiments.bench.buffer import Contender, Worker, compare, describe, goal, take_turns
from experiments.pages.page import Json
from jaxcl.check import at_least, check
from jaxcl.errors import UserError

RESERVOIR, FIFO = (Contender(name, "jax_peers", 1) for name in ("jaxcl_scan", "jaxcl_fifo_scan"))


def measure(
    *,
    capacity: Annotated[int, "rows"] = 32768,
    batch: Annotated[int, "rows in and rows out, a step"] = 64,
    rounds: Annotated[int, "turns of each contender"] = 9,
    seconds: Annotated[float, "length of a turn"] = 0.5,
    peer_python: Annotated[str, "interpreter that has the peers' packages"] = sys.executable,
    mammoth: Annotated[str | None, "checkout of aimagelab/mammoth"] = None,
) -> Json:
    check("--capacity", capacity, at_least(batch))
    if shutil.which(peer_python) is None:
        raise UserError(f"--peer_python: {peer_python} cannot be run")
    flashbax = Contender("flashbax_scan", "jax_peers", 1, peer_python)
    torch = Contender("mammoth", "torch_peers", 1, peer_python, mammoth)
    results, pairs = [], []
    for peer, own in ((flashbax, FIFO), (flashbax, RESERVOIR), (torch, RESERVOIR)):
        workers = [Worker(peer, capacity, batch), Worker(own, capacity, batch)]
        found = take_turns(workers, rounds, seconds)
        results += found
        pairs += [] if any(one.missing for one in found) else [compare(*workers)]
        print(*map(describe, found), sep="\n", flush=True)
    ratio = {(one["peer"], one["jaxcl"]): one["jaxcl_over_peer"] for one in pairs}
    faster = 1 / ratio["mammoth", RESERVOIR.name] if ("mammoth", RESERVOIR.name) in ratio else None
    aims = [
        goal("time over flashbax's in the same scan, fifo", ratio.get(("flashbax_scan", FIFO.name)), 1.0),
        goal("time over flashbax's in the same scan, reservoir", ratio.get(("flashbax_scan", RESERVOIR.name)), 1.0),
        goal("times faster than mammoth", faster, 20.0, least=True),
    ]
    return {"results": [dataclasses.asdict(one) for one in results], "pairs": pairs, "goals": aims}


if __name__ == "__main__":
    harness.run(measure)
