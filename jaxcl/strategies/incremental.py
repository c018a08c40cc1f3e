"""Plain incremental training on new data only: the lower bound, which forgets."""

from jaxcl.strategies.base import Strategy


def incremental() -> Strategy:
    return Strategy()
