"""What checkpoints cost: bytes on disk against bytes of state, the pause in the training loop, the time to restore.

    python -m experiments.bench.checkpoint [--devices=8] [--gib=1.0] [--seconds=60] [--json=FILE]

A training step runs on a buffer of --gib GiB for a while without saving, then as many steps with one save: what the second
stretch took longer is what the save costs, waits and slower steps included. It is given as a share of --seconds, the time
between saves, and holds for the device and disk it was measured on. The same in processor seconds of all threads, as a
share of what the cores have in that time, hardly depends on what else the machine does.
"""

import collections
import os
import pathlib
import statistics
import tempfile
import time
from typing import Annotated

import jax

from configs import digits
from experiments.bench import harness
from experiments.bench.harness import Contender
from experiments.pages.page import Json
from jaxcl.runs.checkpoint import Checkpoints, abstract, name_of, newest
from jaxcl.training.build import build


def measure(
    *,
    gib: Annotated[float, "size of the buffer"] = 1.0,
    seconds: Annotated[float, "between two saves"] = 60.0,
    repeats: Annotated[int, "saves to measure"] = 3,
) -> Json:
    config = digits.get_config()
    config.buffer.policy = "reservoir"
    config.buffer.capacity = int(gib * 2**30 / (64 + 8)) // 64 * 64  # a row: 8x8 bytes, label, id
    run = build(config)
    assert run.buffer is not None
    state = run.new_state(run.new_weights(jax.random.key(0)))
    batch = harness.made_up(run.mesh, config.batch_size, run.train.image_shape, classes=10)
    training = Contender(run.train_step.program.lower(state, batch).compile(), state, batch, blocking=True)
    training.run(20)
    step_seconds = training.run(50)
    payload = sum(x.nbytes for x in jax.tree.leaves(training.state))
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint") as name:
        folder = pathlib.Path(name)
        checkpoints = Checkpoints(folder, keep=2)
        try:
            saves = measure_saves(training, checkpoints, repeats, max(50, int(10.0 / step_seconds)))
            newest_one = max(folder.glob("[0-9]*"))
            on_disk = sum(file.stat().st_size for file in newest_one.rglob("*") if file.is_file())
            restores = measure_restore(training, checkpoints, folder)
        finally:
            checkpoints.close()
    cost = statistics.median(saves["save_costs_seconds"])
    processor_cost = statistics.median(saves["save_costs_processor_seconds"])
    return {
        "state_bytes": payload,
        "buffer_bytes": run.buffer.num_bytes,
        "checkpoint_bytes": on_disk,
        "checkpoint_over_state": on_disk / payload,
        "step_seconds": step_seconds,
        **saves,
        "seconds_between_saves": seconds,
        "share_of_wall_time": cost / seconds,
        "share_of_processor_time": processor_cost / seconds / (os.cpu_count() or 1),
        **restores,
        "processes": jax.process_count(),
    }


def measure_saves(training: Contender, checkpoints: Checkpoints, repeats: int, steps: int) -> dict[str, list[float]]:
    """Of each save: how long the loop stands still, what it costs in all, and when it is complete."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for i in range(repeats):
        before = time.process_time()
        plain = steps * training.run(steps)
        begin, begin_processor = time.perf_counter(), time.process_time()
        checkpoints.save(name_of(i, False, 0), training.state, {})
        blocked = time.perf_counter() - begin
        spent = steps * training.run(steps)
        checkpoints.wait()
        found["save_blocks_seconds"].append(blocked)
        found["save_costs_seconds"].append(blocked + spent - plain)
        found["complete_after_seconds"].append(time.perf_counter() - begin)
        # The stretch with the save less the one before it.
        found["save_costs_processor_seconds"].append(time.process_time() - begin_processor - (begin_processor - before))
    return found


def measure_restore(training: Contender, checkpoints: Checkpoints, folder: pathlib.Path) -> dict[str, float]:
    """The newest checkpoint, restored where the state was, which is gone afterwards."""
    target = abstract(training.state)
    jax.tree.map(lambda x: x.delete(), training.state)
    begin = time.perf_counter()
    manifest = newest(folder)
    verified = time.perf_counter() - begin
    assert manifest is not None
    jax.block_until_ready(checkpoints.restore(manifest, target))
    return {"verify_seconds": verified, "verify_and_restore_seconds": time.perf_counter() - begin}


if __name__ == "__main__":
    harness.run(measure)
