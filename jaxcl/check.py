"""One voice for bad input: which field, which value, what is allowed.

check("batch_size", value, POSITIVE)      # batch_size: -3 is not allowed, give a positive number
check("buffer.memory", value, one_of(MEMORIES))
"""

import difflib
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from jaxcl.errors import UserError


class Rule(NamedTuple):
    """What a value must be.

    Attributes:
      ok: whether it is.
      allowed: the same in words, as they follow "give".
    """

    ok: Callable[[Any], bool]
    allowed: str


def check(field: str, value: Any, rule: Rule) -> None:
    """Raises:
    UserError: the value does not keep the rule.
    """
    if not rule.ok(value):
        raise refused(field, value, rule.allowed)


def refused(field: str, value: Any, allowed: str) -> UserError:
    """The error for a value that is not allowed."""
    return UserError(f"{field}: {value!r} is not allowed, give {allowed}")


def one_of(names: Collection[Any]) -> Rule:
    return Rule(lambda x: x in names, "one of " + ", ".join(str(name) for name in names))


def near(name: str, allowed: Collection[str]) -> str:
    """A hint for a name that does not exist: the nearest one that does, or all of them."""
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed are {', '.join(sorted(allowed))}"


def between(low: float, high: float) -> Rule:
    return Rule(lambda x: low <= x <= high, f"a number from {low:g} to {high:g}")


def at_least(low: float) -> Rule:
    return Rule(lambda x: low <= x < math.inf, f"at least {low:g}")


POSITIVE = Rule(lambda x: 0 < x < math.inf, "a positive number")
NOT_NEGATIVE = Rule(lambda x: 0 <= x < math.inf, "0 or more")
