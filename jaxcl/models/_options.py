"""Options of a model: each is a parameter of its function with a default, and its annotation says what is allowed.

    def convnet(num_classes: int, *, dtype, axis_name, width: Size = 32, norm: Norm = "local") -> nn.Module

`Size` and its like carry a rule of `jaxcl.check`; `Literal`, `bool`, `int`, `float` and `str` speak for themselves. Anything
else is not checked.
"""

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from jaxcl.check import Rule, check, near, one_of
from jaxcl.errors import UserError


def is_size(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _is_scale(x: Any) -> bool:
    return is_size(x) or (isinstance(x, float) and 0 < x < math.inf)


SIZE = Rule(is_size, "a positive int")
Size = Annotated[int, SIZE]
Sizes = Annotated[tuple[int, ...], Rule(lambda x: isinstance(x, tuple) and all(map(is_size, x)), "positive ints")]
Scale = Annotated[float, Rule(_is_scale, "a positive number")]
Norm = Literal["local", "sync"]
Stem = Literal["small", "imagenet"]

_PLAIN = {
    bool: Rule(lambda x: isinstance(x, bool), "True or False"),
    int: Rule(lambda x: isinstance(x, int) and not isinstance(x, bool), "an int"),
    float: Rule(lambda x: isinstance(x, int | float) and not isinstance(x, bool), "a number"),
    str: Rule(lambda x: isinstance(x, str), "a string"),
}


def bind(name: str, make: Callable[..., Any], options: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """Calls `make` with these options and with what it names of `given`.

    Args:
      name: of the model, for errors.
      make: a function, or a class of Linen modules.
      options: by name; a list becomes a tuple, as a module's fields must be hashable.
      given: what every model is offered.

    Raises:
      UserError: an unknown option, or a value that its annotation does not allow.
    """
    parameters = inspect.signature(make).parameters
    own = ("parent", "name")  # of every Linen module
    allowed = [x for x, p in parameters.items() if p.default is not p.empty and x not in given and x not in own]
    rules = _rules(make)
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    for key, value in options.items():
        if key not in allowed:
            hint = near(key, allowed) if allowed else "it has none"
            raise UserError(f"model.options.{key}: {name} has no such option, {hint}")
        if key in rules:
            check(f"model.options.{key}", value, rules[key])
    return make(**{key: value for key, value in given.items() if key in parameters}, **options)


def _rules(make: Callable[..., Any]) -> dict[str, Rule]:
    """The rules that the annotations of a signature state."""
    try:
        hints = typing.get_type_hints(make, include_extras=True)
    except (NameError, TypeError):  # annotations of a foreign model that cannot be read here
        return {}
    found = {key: _rule(hint) for key, hint in hints.items()}
    return {key: rule for key, rule in found.items() if rule}


def _rule(hint: Any) -> Rule | None:
    if typing.get_origin(hint) is Annotated:
        return next((x for x in typing.get_args(hint) if isinstance(x, Rule)), None)
    if typing.get_origin(hint) is Literal:
        return one_of(typing.get_args(hint))
    return _PLAIN.get(hint) if isinstance(hint, type) else None
