"""What checkpoints cost: bytes on disk against bytes of state, the pause in the training loop, the time to restore.

python -m experiments.bench.checkpoint [--devices=8] [--gib=1.0] [--seconds=60] [--out=FILE]

Prints JSON. A training step runs on a buffer of --gib GiB for a while without saving, then as many steps with one save: what
the second stretch took longer is what the save costs, waits and slower steps included. It is given as a share of --seconds, the
time between saves, and holds for the device and disk it was measured on. The same in processor seconds of all threads, as a
share of what the cores have in that time, hardly depends on what else the machine does.
"""

import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from configs import digits
from experiments import cli
from jaxcl import mesh as mesh_lib
from jaxcl.runs import checkpoint, files
from jaxcl.training.build import build
from jaxcl.training.state import initial_state

GIB = flags.DEFINE_float("gib", 1.0, "size of the buffer")
SECONDS = flags.DEFINE_float("seconds", 60.0, "between two saves")
REPEATS = flags.DEFINE_integer("repeats", 3, "saves to measure")
OUT = flags.DEFINE_string("out", None, "also write the JSON here")


def main() -> None:
    config = digits.get_config()
    config.buffer.policy = "reservoir"
    config.buffer.capacity = int(GIB.value * 2**30 / (64 + 8)) // 64 * 64  # a row: 8x8 bytes, label, id
    run = build(config)
    assert run.buffer is not None
    state = initial_state(run.mesh, run.new_weights(jax.random.key(0)), run.buffer, run.strategy)
    rng, rows = np.random.default_rng(0), config.batch_size // jax.process_count()
    batch = mesh_lib.shard_rows(
        run.mesh,
        {
            "image": rng.integers(0, 256, (rows, *run.train.image_shape)).astype(np.uint8),
            "label": rng.integers(0, 10, rows).astype(np.int32),
            "id": np.arange(rows, dtype=np.int32),
            "valid": np.ones(rows, bool),
        },
    )
    step = run.train_step.program.lower(state, batch).compile()

    def steps(state: Any, count: int) -> tuple[Any, float, float]:
        """The state after so many steps, the seconds they took and the processor seconds."""
        begin, begin_processor = time.perf_counter(), time.process_time()
        for _ in range(count):
            state, _ = step(state, batch)
            jax.block_until_ready(state)
        return state, time.perf_counter() - begin, time.process_time() - begin_processor

    state, *_ = steps(state, 20)
    state, spent, _ = steps(state, 50)
    step_seconds = spent / 50
    folder = pathlib.Path(tempfile.mkdtemp(prefix="bench_checkpoint"))
    checkpoints = checkpoint.Checkpoints(folder, keep=2)
    costs, processor, blocked, complete, on_disk = [], [], [], [], 0
    try:
        for i in range(REPEATS.value):
            count = max(50, int(10.0 / step_seconds))
            state, plain, plain_processor = steps(state, count)
            begin, begin_processor = time.perf_counter(), time.process_time()
            checkpoints.save(f"{i:04d}", state, {})
            blocked.append(time.perf_counter() - begin)
            state, spent, _ = steps(state, count)
            slower = blocked[-1] + spent - plain
            begin_wait = time.perf_counter()
            checkpoints.wait()
            complete.append(blocked[-1] + spent + time.perf_counter() - begin_wait)
            costs.append(slower)
            processor.append(time.process_time() - begin_processor - plain_processor)
            on_disk = sum(file.stat().st_size for file in (folder / f"{i:04d}").rglob("*") if file.is_file())
        target = checkpoint.abstract(state)
        payload = sum(x.nbytes for x in jax.tree.leaves(state))
        jax.tree.map(lambda x: x.delete(), state)
        begin = time.perf_counter()
        manifest = checkpoint.newest(folder)
        verified = time.perf_counter() - begin
        assert manifest is not None
        jax.block_until_ready(checkpoints.restore(manifest, target))
        restored = time.perf_counter() - begin
    finally:
        checkpoints.close()
        shutil.rmtree(folder)
    cost, processor_cost = statistics.median(costs), statistics.median(processor)
    found = {
        "state_bytes": payload,
        "buffer_bytes": run.buffer.num_bytes,
        "checkpoint_bytes": on_disk,
        "checkpoint_over_state": on_disk / payload,
        "step_seconds": step_seconds,
        "save_blocks_seconds": blocked,
        "save_costs_seconds": costs,
        "complete_after_seconds": complete,
        "save_costs_processor_seconds": processor,
        "seconds_between_saves": SECONDS.value,
        "share_of_wall_time": cost / SECONDS.value,
        "share_of_processor_time": processor_cost / SECONDS.value / (os.cpu_count() or 1),
        "verify_seconds": verified,
        "verify_and_restore_seconds": restored,
        "devices": {"count": run.mesh.size, "kind": jax.devices()[0].device_kind, "processes": jax.process_count()},
        "versions": {"jax": jax.__version__},
    }
    if jax.process_index() == 0:
        print(json.dumps(found, indent=1))
        if OUT.value is not None:
            files.write_json(pathlib.Path(OUT.value), found)


if __name__ == "__main__":
    cli.run(main)
