"""Insert and draw inside a scan of 100 steps, where no step is dispatched: jaxcl's buffer beside flashbax's, and Mammoth's.

    python -m experiments.bench.buffer_scan --peer_python=PEERS_ENV/bin/python --mammoth=MAMMOTH_CHECKOUT
        --json=experiments/results/bench_buffer_scan.json

As in `experiments.bench.buffer`: each in a process of its own with a full buffer on one device, two taking turns. Mammoth's has
no scan, its step is a call.
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

OWN = Contender("jaxcl_scan", "jax_peers", 1)


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
    peers = [
        Contender("flashbax_scan", "jax_peers", 1, peer_python),
        Contender("mammoth", "torch_peers", 1, peer_python, mammoth),
    ]
    results, pairs = [], []
    for peer in peers:
        workers = [Worker(peer, capacity, batch), Worker(OWN, capacity, batch)]
        found = take_turns(workers, rounds, seconds)
        results += found
        pairs += [] if any(one.missing for one in found) else [compare(*workers)]
        print(*map(describe, found), sep="\n", flush=True)
    ratio = {one["peer"]: one["jaxcl_over_peer"] for one in pairs}
    faster = 1 / ratio["mammoth"] if "mammoth" in ratio else None
    aims = [
        goal("time over flashbax's in the same scan", ratio.get("flashbax_scan"), 1.0),
        goal("times faster than mammoth", faster, 20.0, least=True),
    ]
    return {"results": [dataclasses.asdict(one) for one in results], "pairs": pairs, "goals": aims}


if __name__ == "__main__":
    harness.run(measure)
