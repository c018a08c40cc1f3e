"""Which slot a candidate takes: pure functions of small integer metadata, never of the payload.

A policy is a file of this package, `NAME.py` with a function `NAME(budget) -> Policy`, or `module.path:NAME` from outside.
"""

from collections.abc import Callable

from jaxcl.buffer.policy.base import Budget, Moves, Policy
from jaxcl.check import refused
from jaxcl.registry import Registry

__all__ = ["POLICIES", "Budget", "Moves", "Policy", "make_policy"]

POLICIES: Registry[Callable[[Budget], Policy]] = Registry("buffer.policy", "jaxcl.buffer.policy")


def make_policy(
    name: str, *, capacity: int, shards: int, num_classes: int | None = None, accept: float | None = None
) -> Policy:
    """The policy called `name` for a union of `capacity` rows over `shards` devices; see `Budget`.

    Raises:
      UserError: unknown name, a size out of range, or an argument the policy needs and did not get.
    """
    make = POLICIES[name]
    if capacity < shards:
        raise refused("buffer.capacity", capacity, f"at least {shards}, a row for each device")
    return make(Budget(capacity, shards, num_classes, accept))
