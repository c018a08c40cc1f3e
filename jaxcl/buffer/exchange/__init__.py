"""How drawn rows come to the devices that replay them.

An exchange is a file of this package, `NAME.py` with a function `NAME(per_device, shards, axis) -> tuple of Route`, or
`module.path:NAME` from outside. `per_device` is r, `shards` N and `axis` that of the mesh. Of two routes the first is tried
first and the last must fit every draw. Without a route every device draws from what it holds, and nothing travels.
"""

from collections.abc import Callable

from jaxcl.buffer.exchange.base import Route
from jaxcl.registry import Registry

__all__ = ["EXCHANGES", "Route"]

EXCHANGES: Registry[Callable[..., tuple[Route, ...]]] = Registry("buffer.exchange", "jaxcl.buffer.exchange")
