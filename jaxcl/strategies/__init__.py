"""What distinguishes one way of continual learning from another; one file a strategy.

A file NAME.py has a function `NAME(options...) -> Strategy`; the options' names, types and defaults are those of
`config.strategies.NAME`. One from outside is named `module.path:NAME`, and its options are those of `config.strategies.NAME`
too. docs/strategies.md shows how to add one.
"""

import typing
from collections.abc import Callable, Mapping
from typing import Any

from jaxcl.registry import Registry
from jaxcl.strategies.base import Context, Descent, End, Part, Share, Strategy
from jaxcl.types import Number

__all__ = [
    "STRATEGIES",
    "Context",
    "Descent",
    "End",
    "Part",
    "Share",
    "Strategy",
    "make_strategy",
    "number_options",
]

STRATEGIES: Registry[Callable[..., Strategy]] = Registry("strategy", "jaxcl.strategies")


def make_strategy(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """The strategy called `name`, bound to `options`; what is left out keeps its default.

    Raises:
      UserError: unknown name or option, or a value that the strategy refuses.
    """
    return STRATEGIES.make(name, options)


def number_options(name: str) -> list[str]:
    """The options of a strategy that are annotated `Number`: its functions take traced ones in their place."""
    try:
        hints = typing.get_type_hints(STRATEGIES[name])
    except (NameError, TypeError):  # of one from outside
        return []
    return [option for option in STRATEGIES.options(name) if hints.get(option) == Number]
