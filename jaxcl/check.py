"""One voice for bad input: which field, which value, what is allowed.

check("batch_size", value, POSITIVE)      # batch_size: -3 is not allowed, give a positive number
check("buffer.memory", value, one_of(MEMORIES))
"""

import difflib
import numbers
import sys
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from jaxcl.errors import UserError

MOST = 160  # characters of a value in a message


class Rule(NamedTuple):
    """What a value must be.

    Attributes:
      ok: whether it is; takes a value of any type.
      allowed: the same in words, as they follow "give".
    """

    ok: Callable[[Any], bool]
    allowed: str


def check(field: str, value: Any, rule: Rule) -> None:
    """Raises:
    UserError: the value does not keep the rule.
    """
    if not _traced(value) and not rule.ok(value):
        raise refused(field, value, rule.allowed)


def _traced(value: Any) -> bool:
    """Whether it is a number of a config within a step: its value was checked before. JAX is not imported to find out, since a
    command checks its name before its signals are owned."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer)


def refused(field: str, value: Any, allowed: str) -> UserError:
    """The error for a value that is not allowed."""
    return UserError(f"{field}: {_shown(value)} is not allowed, give {allowed}")


def _shown(value: Any) -> str:
    """A value on one line that can be read."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # of a number of more than 4,300 digits
        text = f"a {type(value).__name__} too long to write"
    return text if len(text) <= MOST else f"{text[: MOST - 20]}...{text[-20:]}"


def unknown_field(field: str, allowed: Collection[str]) -> UserError:
    """The error for a field, named with its dots, that does not exist among `allowed` of its group."""
    return UserError(f"{field}: no such field; {near(field.rpartition('.')[2], allowed)}")


def near(name: str, allowed: Collection[str]) -> str:
    """A hint for a name that does not exist: the nearest one that does, or all of them."""
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed are {', '.join(sorted(allowed)) or 'none'}"


def is_number(x: Any) -> bool:
    """Whether it is a number that is finite in float32, and no 0 there unless it is one; True and False are none."""
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        return False
    return x == 0 or 1.2e-38 < abs(x) < 3.4e38  # type: ignore[operator]


def one_of(names: Collection[Any]) -> Rule:
    return Rule(lambda x: x in names, "one of " + ", ".join(str(name) for name in names))


def found_in(registry: Collection[str]) -> Rule:
    """A name of the registry, or `module.path:name`, which is imported where it is used."""
    names = ", ".join(registry)
    return Rule(
        lambda x: isinstance(x, str) and (x in registry or (NAME.ok(x) and ":" in x)), f"one of {names}, or module:name"
    )


def each(rule: Rule) -> Rule:
    """A list of which every item keeps the rule."""
    return Rule(lambda x: isinstance(x, list | tuple) and all(map(rule.ok, x)), f"a list with each item {rule.allowed}")


def between(low: float, high: float) -> Rule:
    return Rule(lambda x: is_number(x) and low <= x <= high, f"a number from {low} to {high}")


def at_least(low: float) -> Rule:
    return Rule(lambda x: is_number(x) and x >= low, f"at least {low}")


POSITIVE = Rule(lambda x: is_number(x) and x > 0, "a positive number")
NOT_NEGATIVE = Rule(lambda x: is_number(x) and x >= 0, "0 or more")
SHARE = Rule(lambda x: is_number(x) and 0 < x <= 1, "a number above 0 and at most 1")
FRACTION = Rule(lambda x: is_number(x) and 0 <= x < 1, "a number from 0 to less than 1")
SEED = Rule(lambda x: is_number(x) and 0 <= x < 2**31, "a whole number from 0 to 2^31 - 1")
COUNT = Rule(lambda x: is_number(x) and 0 < x < 2**31, "a whole number from 1 to 2^31 - 1")
PATH = Rule(
    lambda x: isinstance(x, str) and "\0" not in x and all(len(part.encode()) < 256 for part in x.split("/")),
    "a name or a path, of parts of at most 255 bytes",
)
NAME = Rule(lambda x: isinstance(x, str) and all(x.split(":")) and x.count(":") < 2, "a name, or module:name")
