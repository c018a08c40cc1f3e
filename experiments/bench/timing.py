"""Timing steps against each other: always in turn in one process, so that what else the machine does hits all alike."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class Contender:
    """A compiled step, its state and the batch it is fed."""

    step: Any
    state: Any
    batch: dict[str, jax.Array]
    seconds: list[float] = dataclasses.field(default_factory=list)

    def run(self, steps: int) -> float:
        """Seconds a step, over `steps` of them dispatched without waiting."""
        begin = time.perf_counter()
        for _ in range(steps):
            self.state, _ = self.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - begin) / steps


def in_turn(contenders: Sequence[Contender], runs: int, steps: int) -> None:
    """Adds `runs` timings of `steps` steps each to every contender; who begins, and in which direction the turn goes, changes
    from run to run."""
    n = len(contenders)
    for i in range(runs):
        for j in range(n):
            one = contenders[(i + (j if i // n % 2 else -j)) % n]
            one.seconds.append(one.run(steps))


def quantiles(values: Any) -> dict[str, float]:
    return {"p10": float(np.quantile(values, 0.1)), "p90": float(np.quantile(values, 0.9)), "n": len(values)}


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, p10 and p90 in milliseconds."""
    ms = 1e3 * np.array(seconds)
    return {"median": float(np.median(ms)), **quantiles(ms)}
