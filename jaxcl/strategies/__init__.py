"""What distinguishes one way of continual learning from another; one file a strategy.

Each file has one function `NAME(options...) -> Strategy`; the options' names, types and defaults are those of
`config.strategies.NAME`. docs/strategies.md shows how to add one.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxcl.errors import UserError
from jaxcl.strategies.agem import agem
from jaxcl.strategies.base import Context, Descent, End, Part, Share, Strategy
from jaxcl.strategies.bic import bic
from jaxcl.strategies.der import der
from jaxcl.strategies.der_pp import der_pp
from jaxcl.strategies.er import er
from jaxcl.strategies.er_ace import er_ace
from jaxcl.strategies.ewc import ewc
from jaxcl.strategies.feature_distillation import feature_distillation
from jaxcl.strategies.from_scratch import from_scratch
from jaxcl.strategies.gdumb import gdumb
from jaxcl.strategies.icarl import icarl
from jaxcl.strategies.incremental import incremental
from jaxcl.strategies.joint import joint
from jaxcl.strategies.l2 import l2
from jaxcl.strategies.lwf import lwf
from jaxcl.strategies.mir import mir
from jaxcl.strategies.wa import wa

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
    make.__name__: make
    for make in (
        from_scratch,
        joint,
        incremental,
        er,
        er_ace,
        der,
        der_pp,
        agem,
        mir,
        gdumb,
        icarl,
        bic,
        wa,
        lwf,
        ewc,
        l2,
        feature_distillation,
    )
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
