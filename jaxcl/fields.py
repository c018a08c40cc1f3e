"""The fields of a config, each declared once: its default, its type, what is allowed, and what it means.

FIELDS = {"epochs": Field(1, "passes over a task's data", POSITIVE), "model": {"width": Field(16, ...)}}
default_of(FIELDS)               # the ConfigDict of the defaults
check_fields(config, FIELDS)     # unknown and missing fields, types, None, numbers that are not finite, rules
text(FIELDS), table(FIELDS)      # the same for people, in a terminal and in markdown
"""

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from ml_collections import ConfigDict, config_dict

from jaxcl.check import Rule, check, is_number, refused, unknown_field
from jaxcl.errors import UserError


@dataclasses.dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
      default: None where the field may be left open; only then None is allowed.
      meaning: one line.
      rule: what a value must be beside its type.
      kind: its type, or types, where the default does not tell.
    """

    default: Any
    meaning: str
    rule: Rule | None = None
    kind: type | tuple[type, ...] | None = None

    @property
    def kinds(self) -> tuple[type, ...]:
        kind = type(self.default) if self.kind is None else self.kind
        return kind if isinstance(kind, tuple) else (kind,)

    def check(self, name: str, value: Any) -> None:
        """Raises:
        UserError: the value is not allowed.
        """
        if value is None and self.default is None:
            return
        if not any(_TYPES[kind].ok(value) for kind in self.kinds):
            raise refused(name, value, " or ".join(_TYPES[kind].allowed for kind in self.kinds))
        if self.rule is not None:
            check(name, value, self.rule)


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**63


_TYPES = {
    bool: Rule(lambda x: isinstance(x, bool), "True or False"),
    int: Rule(_is_whole, "a whole number"),
    float: Rule(is_number, "a number that float32 holds"),
    str: Rule(lambda x: isinstance(x, str), "a text"),
    tuple: Rule(lambda x: isinstance(x, list | tuple), "a list"),
    dict: Rule(lambda x: isinstance(x, ConfigDict), "a group of options"),
}
Fields: TypeAlias = Mapping[str, "Field | Fields"]


def default_of(fields: Fields) -> ConfigDict:
    """The config of the defaults, which keeps each field's type."""

    def value(field: "Field | Fields") -> Any:
        if not isinstance(field, Field):
            return default_of(field)
        return config_dict.placeholder(field.kinds[0]) if field.default is None else field.default

    return ConfigDict({name: value(field) for name, field in fields.items()})


def check_fields(config: ConfigDict, fields: Fields, path: str = "") -> None:
    """Whether `config` has these fields and no others, with values that are allowed.

    Args:
      path: of the group within the whole config, with a dot behind it.

    Raises:
      UserError: it has not.
    """
    for name in config:
        if name not in fields:
            raise unknown_field(path + name, list(fields))
    for name, field in fields.items():
        if name not in config:
            raise UserError(f"{path}{name}: missing; start the config from default_config()")
        if isinstance(field, Field):
            field.check(path + name, config[name])
        elif not isinstance(config[name], ConfigDict):
            raise refused(path + name, config[name], "a group of fields")
        else:
            check_fields(config[name], field, f"{path}{name}.")


def flat(fields: Fields, path: str = "") -> Iterator[tuple[str, Field]]:
    """Every field with its whole name."""
    for name, field in fields.items():
        if isinstance(field, Field):
            yield path + name, field
        else:
            yield from flat(field, f"{path}{name}.")


def text(fields: Fields, width: int) -> str:
    """All fields for a terminal of `width` columns."""
    blocks = []
    for name, field in flat(fields):
        kind, default, allowed = _words(field)
        blocks.append(f"--config.{name}={default}")
        about = f"{field.meaning} ({kind}{': ' if allowed else ''}{allowed})"
        blocks.append(textwrap.fill(about, width, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(blocks)


def table(fields: Fields) -> str:
    """All fields as a table in markdown."""
    rows = [("field", "type", "default", "allowed", "meaning"), ("---",) * 5]
    for name, field in flat(fields):
        kind, default, allowed = _words(field)
        rows.append((f"`{name}`", kind, f"`{default}`", allowed, field.meaning))
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _words(field: Field) -> tuple[str, str, str]:
    """Its type, its default and what is allowed."""
    kind = " or ".join(kind.__name__ for kind in field.kinds) + (" or None" if field.default is None else "")
    return kind, str(field.default), "" if field.rule is None else field.rule.allowed
