"""What distinguishes one way of continual learning from another; one file a strategy.

A file NAME.py has a function `NAME(options...) -> Strategy`; the options' names, types and defaults are those of
`config.strategies.NAME`. One from outside is named `module.path:NAME`, and its options are those of `config.strategies.NAME`
too. docs/strategies.md shows how to add one.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxcl.registry import Registry
from jaxcl.strategies.base import Context, Descent, End, Part, Share, Strategy

__all__ = [
    "STRATEGIES",
    "Context",
    "Descent",
    "End",
    "Part",
    "Share",
    "Strategy",
    "make_strategy",
]

STRATEGIES: Registry[Callable[..., Strategy]] = Registry("strategy", "jaxcl.strategies")


def make_strategy(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """The strategy called `name`, bound to `options`; what is left out keeps its default.

    Raises:
      UserError: unknown name or option, or a value that the strategy refuses.
    """
    return STRATEGIES.make(name, options)
