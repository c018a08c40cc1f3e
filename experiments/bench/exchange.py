"""The plan and the exchange of a draw for up to 1,024 devices, without the devices.

    python -m experiments.bench.exchange --json=experiments/results/exchange_scale.json

The plan is a replicated pure function, so its time is that of one device; what every device would send follows from it.
For N devices and r representatives on each, shards of equal size: rows put into collectives over rows needed, how often the
compact route does not fit (1 = every draw), and the time of the plan. `mix` needs r rows a device, less what it draws from
itself; `balance` needs only what shards supply beyond r.
"""

import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli
from experiments.bench.environment import environment
from jaxcl.buffer import EXCHANGES, draw
from jaxcl.buffer.exchange.base import six_sigma
from jaxcl.buffer.exchange.mix import compact_hops
from jaxcl.mesh import AXIS

DRAWS = flags.DEFINE_integer("draws", 20_000, "draws a setting; fewer with many devices (at most 2e7 rows in all)")
DEVICES = (8, 64, 128, 512, 1024)
PER_DEVICE = (7, 16, 56)


def measure(shards: int, per_device: int, draws: int) -> dict:
    """One setting; shards of 64 r rows each."""
    count = shards * per_device
    draws = max(200, min(draws, 20_000_000 // count))
    sizes = jnp.full((shards,), 64 * per_device, jnp.int32)
    hops = compact_hops(per_device, shards)
    one_hop = shards * min(per_device, six_sigma(per_device, shards))
    mix = EXCHANGES["mix"](per_device, shards, AXIS)[0]
    balance = EXCHANGES["balance"](per_device, shards, AXIS)[0]

    @jax.jit
    def one(key: jax.Array) -> tuple[jax.Array, ...]:
        plan = draw.make_plan(key, sizes, count)
        beyond = jnp.sum(jnp.maximum(jnp.diff(plan.first) - per_device, 0))
        return mix.fits(plan), balance.fits(plan), beyond

    fits = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(0), draws))
    mix_fits, balance_fits, beyond = (np.asarray(x) for x in fits)

    plan = jax.jit(lambda key: draw.make_plan(key, sizes, count))
    keys = [jax.random.key(i) for i in range(30)]
    jax.block_until_ready(plan(keys[0]))
    seconds = []
    for key in keys:
        begin = time.perf_counter()
        jax.block_until_ready(plan(key))
        seconds.append(time.perf_counter() - begin)
    travels = per_device * (shards - 1) / shards
    return {
        "devices": shards,
        "per_device": per_device,
        "draws": draws,
        "mix": {
            "hops": [hops.across, hops.along] if hops.along > 1 else [shards],
            "rows_moved": mix.rows_moved,
            "moved_over_needed": mix.rows_moved / per_device,
            "one_hop_moved_over_needed": one_hop / per_device,
            "rows_that_must_travel": travels,
            "slow_path_frequency": float(1 - mix_fits.mean()),
        },
        "balance": {
            "rows_moved": balance.rows_moved,
            "rows_that_must_travel": float(beyond.mean() / shards),
            "slow_path_frequency": float(1 - balance_fits.mean()),
        },
        "plan_ms": {"median": 1e3 * float(np.median(seconds)), "p90": 1e3 * float(np.quantile(seconds, 0.9))},
    }


def main() -> None:
    settings = []
    print("    N   r  hops        moved/needed  one hop  slow path   balance: must travel  moved  slow path    plan ms")
    for shards in DEVICES:
        for per_device in PER_DEVICE:
            found = measure(shards, per_device, DRAWS.value)
            settings.append(found)
            mix, balance = found["mix"], found["balance"]
            hops = " x ".join(map(str, mix["hops"]))
            print(
                f"{shards:5d} {per_device:3d}  {hops:10s}"
                f" {mix['moved_over_needed']:13.1f} {mix['one_hop_moved_over_needed']:8.1f}"
                f" {mix['slow_path_frequency']:10.1e} {balance['rows_that_must_travel']:22.2f} {balance['rows_moved']:6d}"
                f" {balance['slow_path_frequency']:10.1e} {found['plan_ms']['median']:10.2f}",
                flush=True,
            )
    report = {"settings": settings, **environment()}
    if cli.JSON.value:
        pathlib.Path(cli.JSON.value).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
