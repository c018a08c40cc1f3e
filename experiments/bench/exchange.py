"""The plan and the exchange of a draw for up to 1,024 devices, without the devices.

    python -m experiments.bench.exchange [--json=FILE] [--draws=20000]

The plan is a replicated pure function, so its time is that of one device; what every device would send follows from it.
For N devices and r representatives on each, shards of equal size: rows put into collectives over rows needed, how often the
compact route does not fit (1 = every draw), and the time of the plan. `mix` needs r rows a device, less what it draws from
itself; `balance` needs only what shards supply beyond r.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import harness
from experiments.pages.page import Json
from jaxcl.buffer import EXCHANGES, draw
from jaxcl.buffer.exchange.base import six_sigma
from jaxcl.buffer.exchange.mix import compact_hops
from jaxcl.mesh import AXIS

DEVICES = (8, 64, 128, 512, 1024)
PER_DEVICE = (7, 16, 56)


def measure(*, draws: Annotated[int, "a setting; fewer with many devices, at most 2e7 rows in all"] = 20_000) -> Json:
    settings = []
    for shards in DEVICES:
        for per_device in PER_DEVICE:
            settings.append(one_setting(shards, per_device, draws))
            harness.show(settings[-1])
    return {"settings": settings}


def one_setting(shards: int, per_device: int, draws: int) -> Json:
    """N = `shards` of 64 r rows each, r = `per_device`."""
    count = shards * per_device
    draws = max(200, min(draws, 20_000_000 // count))
    sizes = jnp.full((shards,), 64 * per_device, jnp.int32)
    hops = compact_hops(per_device, shards)
    one_hop = shards * min(per_device, six_sigma(per_device, shards))
    mix = EXCHANGES["mix"](per_device, shards, AXIS)[0]
    balance = EXCHANGES["balance"](per_device, shards, AXIS)[0]

    def fits(key: jax.Array) -> tuple[jax.Array, ...]:
        plan = draw.make_plan(key, sizes, count)
        beyond = jnp.sum(jnp.maximum(jnp.diff(plan.first) - per_device, 0))
        return mix.fits(plan), balance.fits(plan), beyond

    keys = jax.random.split(jax.random.key(0), draws)
    mix_fits, balance_fits, beyond = map(np.asarray, jax.jit(lambda keys: jax.lax.map(fits, keys))(keys))

    plan = jax.jit(lambda key: draw.make_plan(key, sizes, count))
    planner = harness.Contender(
        lambda _, keys: (plan(next(keys)), None), None, iter(list(map(jax.random.key, range(31))))
    )
    planner.run(1)
    return {
        "devices": shards,
        "per_device": per_device,
        "draws": draws,
        "mix": {
            "hops": [hops.across, hops.along] if hops.along > 1 else [shards],
            "rows_moved": mix.rows_moved,
            "moved_over_needed": mix.rows_moved / per_device,
            "one_hop_moved_over_needed": one_hop / per_device,
            "rows_that_must_travel": per_device * (shards - 1) / shards,
            "slow_path_frequency": float(1 - mix_fits.mean()),
        },
        "balance": {
            "rows_moved": balance.rows_moved,
            "moved_over_needed": (balance.rows_moved + (1 - balance_fits.mean()) * shards * per_device) / per_device,
            "rows_that_must_travel": float(beyond.mean() / shards),
            "slow_path_frequency": float(1 - balance_fits.mean()),
        },
        "plan_ms": planner.turns(30),
    }


if __name__ == "__main__":
    harness.run(measure)
