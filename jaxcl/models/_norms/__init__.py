"""Norms of the networks, one file each; a model that has a parameter `norm` without a default is given the one that the
options ask for.

A file NAME.py has a function `NAME(option=default, ...) -> Normalisation`. The options of the model choose it, `norm = NAME`
and `norm_options = {option: value}`. One from outside is named `module.path:NAME`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp

from jaxcl.check import Rule, check, found_in
from jaxcl.mesh import Axis
from jaxcl.models._norms.base import Normalisation, RowFacts
from jaxcl.models._options import bind
from jaxcl.registry import Registry

__all__ = ["NORMS", "Normalisation", "RowFacts", "make_norm"]

NORMS: Registry[Callable[..., Normalisation]] = Registry("model.options.norm", __name__)


def make_norm(
    name: str, options: Mapping[str, Any], *, axis_name: Axis | None, dtype: jnp.dtype, tasks: int
) -> Normalisation:
    """A norm, bound to its options and to where it computes.

    Args:
      name: one of `NORMS`, or `module.path:name`.
      options: of the norm; what is left out keeps its default.
      axis_name: mesh axis of the batch, or axes.
      dtype: of the outputs.
      tasks: T, for a norm that keeps something of each.

    Raises:
      UserError: an unknown norm or option, or a value that is not allowed.
    """
    check("model.options.norm", name, found_in(NORMS))
    check("model.options.norm_options", options, Rule(lambda x: isinstance(x, Mapping), "a group of options"))
    norm = bind(name, NORMS[name], options, {"tasks": tasks}, "model.options.norm_options")
    return dataclasses.replace(norm, layer=partial(norm.layer, axis_name=axis_name, dtype=dtype))
