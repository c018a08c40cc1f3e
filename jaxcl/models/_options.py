"""Options of a model, or of a norm: each is a field, or a parameter, with a default, and its annotation says what is allowed.

    width: Size = 32
    stem: Stem = "small"

`Size` and its like carry a rule of `jaxcl.check`; `Literal`, `bool`, `int`, `float` and `str` speak for themselves. Anything
else is not checked.
"""

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal

from jaxcl.check import NOT_NEGATIVE, POSITIVE, Rule, between, check, is_number, near, one_of
from jaxcl.errors import UserError

_PLAIN = {
    bool: Rule(lambda x: isinstance(x, bool), "True or False"),
    int: Rule(lambda x: isinstance(x, int) and not isinstance(x, bool), "an int"),
    float: Rule(is_number, "a number"),
    str: Rule(lambda x: isinstance(x, str), "a string"),
}
SIZE = Rule(lambda x: _PLAIN[int].ok(x) and 0 < x < 2**31, "a positive int")
Size = Annotated[int, SIZE]
Sizes = Annotated[tuple[int, ...], Rule(lambda x: isinstance(x, tuple) and all(map(SIZE.ok, x)), "positive ints")]
Scale = Annotated[float, POSITIVE]
Amount = Annotated[float, NOT_NEGATIVE]
Share = Annotated[float, between(0, 1)]
WHOLE = Rule(lambda x: _PLAIN[int].ok(x) and 0 <= x < 2**31, "0 or a positive int")
Whole = Annotated[int, WHOLE]
Stem = Literal["small", "imagenet"]


def bind(
    name: str,
    make: Callable[..., Any],
    options: Mapping[str, Any],
    given: Mapping[str, Any],
    field: str = "model.options",
    more: Collection[str] = (),
) -> Any:
    """Calls `make` with these options and with what it names of `given`.

    Args:
      name: of what is made, for errors.
      make: a function, or a class of Linen modules.
      options: by name; a list becomes a tuple, as a module's fields must be hashable.
      given: what everything of its kind is offered.
      field: of the config, which has the options.
      more: options beside these, which the caller has taken; for errors.

    Raises:
      UserError: an unknown option, or a value that its annotation does not allow.
    """
    parameters = inspect.signature(make).parameters
    own = ("parent", "name")  # of every Linen module
    allowed = [x for x, p in parameters.items() if p.default is not p.empty and x not in given and x not in own]
    try:
        hints = typing.get_type_hints(make, include_extras=True)
    except (NameError, TypeError):  # annotations of a foreign model that cannot be read here
        hints = {}
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    for key, value in options.items():
        if key not in allowed:
            hint = near(key, [*allowed, *more]) if allowed or more else "it has none"
            raise UserError(f"{field}.{key}: {name} has no such option, {hint}")
        if rule := _rule(hints.get(key)):
            check(f"{field}.{key}", value, rule)
    return make(**{key: value for key, value in given.items() if key in parameters}, **options)


def _rule(hint: Any) -> Rule | None:
    if typing.get_origin(hint) is Annotated:
        return next((x for x in typing.get_args(hint) if isinstance(x, Rule)), None)
    if typing.get_origin(hint) is Literal:
        return one_of(typing.get_args(hint))
    return _PLAIN.get(hint) if isinstance(hint, type) else None
