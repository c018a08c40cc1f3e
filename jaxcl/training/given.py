"""What distinguishes runs of one program: the key of their seed and the numbers of their config.

Both are arguments of a step, not constants in it: runs that differ in nothing else, as those of a sweep over learning rates or
of several seeds do, compile once and find each other's programs in the cache.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcl import mesh as mesh_lib
from jaxcl.types import Number, PyTree

Numbers = Mapping[str, Number]  # by the field of the config


class Given(NamedTuple):
    """What a step is given beside state and batch; whole on every device.

    Attributes:
      key: uint32, the data of the run's key; of several seeds with a leading axis.
      numbers: float32 scalars by the field of the config.
    """

    key: jax.Array
    numbers: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A jitted function to which the first argument is given: called, lowered and compiled with the others alone."""

    function: Any
    given: Given

    def __call__(self, *args: PyTree) -> Any:
        return self.function(self.given, *args)

    def lower(self, *args: PyTree) -> "Program":
        return Program(self.function.lower(self.given, *args), self.given)

    def compile(self) -> "Program":
        return Program(self.function.compile(), self.given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)


def make_given(mesh: Mesh, seed: int | Sequence[int], numbers: Mapping[str, float]) -> Given:
    """Of a run, or of several seeds that train together."""
    data = [np.asarray(jax.random.key_data(jax.random.key(int(one)))) for one in np.atleast_1d(seed)]
    key: Any = data[0] if isinstance(seed, int) else np.stack(data)
    scalars: Any = {name: np.float32(x) for name, x in numbers.items()}
    return mesh_lib.replicate(mesh, Given(key, scalars))
