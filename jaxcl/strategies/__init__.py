"""What distinguishes one way of continual learning from another; one file a strategy.

A strategy says which rows a task trains on, whether it starts from fresh weights, and what the rehearsal buffer holds.
"""

from jaxcl.errors import UserError
from jaxcl.strategies import er, from_scratch, incremental
from jaxcl.strategies.base import Strategy

__all__ = ["STRATEGIES", "Strategy", "make_strategy"]

STRATEGIES: dict[str, Strategy] = {
    "from_scratch": from_scratch.strategy,
    "incremental": incremental.strategy,
    "er": er.strategy,
}


def make_strategy(name: str) -> Strategy:
    """The strategy called `name`.

    Raises:
      UserError: unknown name.
    """
    if name not in STRATEGIES:
        raise UserError(f"strategy: {name!r} is unknown, choose one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
