"""What distinguishes one way of continual learning from another; one file a strategy.

A file NAME.py has a function `NAME(options...) -> Strategy`; the options' names, types and defaults are those of
`config.strategies.NAME`. docs/strategies.md shows how to add one.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from jaxcl.errors import UserError
from jaxcl.strategies.base import Context, Descent, End, Part, Share, Strategy

__all__ = [
    "STRATEGIES",
    "Context",
    "Descent",
    "End",
    "Part",
    "Share",
    "Strategy",
    "default_options",
    "make_strategy",
]

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    file.name: getattr(importlib.import_module(f"{__name__}.{file.name}"), file.name)
    for file in pkgutil.iter_modules(__path__)
    if file.name != "base"
}


def default_options(name: str) -> dict[str, Any]:
    """The options of a strategy and their defaults, as its signature says."""
    return {p.name: p.default for p in inspect.signature(STRATEGIES[name]).parameters.values()}


def make_strategy(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """The strategy called `name`, bound to `options`; what is left out keeps its default.

    Raises:
      UserError: unknown name or option, or a value that the strategy refuses.
    """
    if name not in STRATEGIES:
        raise UserError(f"strategy: {name!r} is unknown, choose one of {', '.join(STRATEGIES)}")
    allowed = default_options(name)
    for option in options or {}:
        if option not in allowed:
            choice = f"choose one of {', '.join(allowed)}" if allowed else "it has none"
            raise UserError(f"strategies.{name}.{option}: no such option; {choice}")
    return STRATEGIES[name](**(options or {}))
