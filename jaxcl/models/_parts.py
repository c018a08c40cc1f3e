"""The parts of a network, as the top level of its parameters names them, and parts that are kept as they are."""

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from jaxcl.errors import UserError
from jaxcl.models._norms.base import NormLayer
from jaxcl.types import PyTree

HEAD, PROMPTS, NECK, BACKBONE = "head", "prompts", "neck_", "backbone"


def is_own(part: str) -> bool:
    """Whether a part belongs to the classes and tasks of a run: it is none of the backbone's, and a file of weights need not
    have it. The head, prompts, and dense layers before the head that a pretrained network did not have ("neck_0")."""
    return part in (HEAD, PROMPTS) or part.startswith(NECK)


def parts_named(field: str, patterns: Sequence[str], parts: Collection[str]) -> list[str]:
    """The parts that any of these names means: that of a part, `backbone` for all but those that `is_own` says, or a pattern
    ("block_*").

    Raises:
      UserError: one of them means none.
    """
    found: list[str] = []
    for pattern in patterns:
        if pattern == BACKBONE and BACKBONE not in parts:
            named = [part for part in parts if not is_own(part)]
        else:
            named = fnmatch.filter(parts, pattern)
        if not named:
            raise UserError(f"{field}: {pattern!r} is no part of the model; choose from {', '.join(parts)}")
        found += [part for part in named if part not in found]
    return found


def scale_of_parts(field: str, scales: Mapping[str, float], parts: Collection[str]) -> dict[str, float]:
    """The number of every part that is given one: a part's own name goes before a pattern that means it too.

    Raises:
      UserError: a name means no part, or two patterns mean the same one.
    """
    found = {}
    own = [name for name in scales if name in parts]
    for pattern in [name for name in scales if name not in parts]:
        for part in parts_named(field, [pattern], parts):
            if part in found:
                raise UserError(f"{field}: two of {', '.join(scales)} mean {part}; give it under its own name")
            if part not in own:
                found[part] = scales[pattern]
    return found | {name: scales[name] for name in own}


def with_still(model: Any, parts: Collection[str]) -> Any:
    """The model with these parts as in evaluation also where the rest is trained: their norms use the running statistics, and
    leave them as they are; and no task begins with others."""
    if not parts:
        return model

    def keep(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name == "__call__" and module.path and module.path[0] in parts:
            if isinstance(module, NormLayer):
                kwargs = {**kwargs, "train": False}
            elif isinstance(module, nn.BatchNorm):
                kwargs = {**kwargs, "use_running_average": True}
        return call(*args, **kwargs)

    def apply(
        params: PyTree, batch_stats: PyTree, images: jax.Array, **how: Any
    ) -> tuple[dict[str, jax.Array], PyTree]:
        with nn.intercept_methods(keep):
            return model.apply(params, batch_stats, images, **how)

    def begin(params: PyTree, task: jax.Array) -> PyTree:
        return model.begin(params, task) | {part: params[part] for part in parts}

    return model._replace(apply=apply, begin=model.begin and begin)
