"""Things chosen by name in a config: each is one file of its package, or comes from outside.

A file `NAME.py` of the package holds a function `NAME`; there is no list to enter it in. From outside the package a thing is
named `module.path:NAME`, or it is given to `register` and then has the name of its function. Its options, their types and
defaults are those of its signature.
"""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from jaxcl.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])


class Registry(Mapping[str, F], Generic[F]):
    """The functions of a package by name; a file is imported when it is first asked for.

    Args:
      field: of the config, for errors.
      package: dotted name. Files called `base`, and those that begin with an underscore, are no entries.
    """

    def __init__(self, field: str, package: str):
        self.field, self._package = field, package
        path = importlib.import_module(package).__path__ if package else []
        names = sorted(file.name for file in pkgutil.iter_modules(path))
        self._found: dict[str, F | None] = {x: None for x in names if x != "base" and not x.startswith("_")}

    def register(self, make: F, name: str | None = None) -> F:
        """Adds a function under its own name, or another; usable as a decorator.

        Raises:
          UserError: the name is taken by another function.
        """
        name = name or make.__name__
        if name in self._found and self[name] is not make:
            raise UserError(f"{self.field}: {name!r} is registered already")
        self._found[name] = make
        return make

    def __getitem__(self, name: str) -> F:
        """The function called `name`, or of `module.path:name`.

        Raises:
          UserError: there is none.
        """
        if name not in self._found:
            return self._outside(name) if ":" in name else self._unknown(name)
        found = self._found[name]
        if found is None:
            found = getattr(importlib.import_module(f"{self._package}.{name}"), name)
            self._found[name] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def from_outside(self, name: str) -> F | None:
        """The function called `name` if it is none of the package's files, else None.

        Raises:
          UserError: there is none.
        """
        found = self._found[name] if name in self._found else self[name]  # None: a file that nobody has asked for
        return None if found is None or found.__module__.startswith(f"{self._package}.") else found

    def options(self, name: str) -> dict[str, Any]:
        """The options of an entry and their defaults: the parameters of its signature that have one."""
        parameters = inspect.signature(self[name]).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def make(self, name: str, options: Mapping[str, Any] | None = None, **given: Any) -> Any:
        """Calls the entry with what every entry is given and with these options; what is left out keeps its default.

        Raises:
          UserError: an unknown name or option.
        """
        allowed = self.options(name)
        for option in options or {}:
            if option not in allowed:
                choice = f"choose one of {', '.join(allowed)}" if allowed else "it has none"
                raise UserError(f"{self.field}: {name} has no option {option!r}; {choice}")
        return self[name](**given, **(options or {}))

    def _outside(self, name: str) -> F:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"{self.field}: {name!r} cannot be imported: {error}") from None

    def _unknown(self, name: str) -> F:
        near = difflib.get_close_matches(str(name), self._found, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(self._found)}, or give module:name"
        raise UserError(f"{self.field}: {name!r} is unknown, {hint}")


def short(name: str) -> str:
    """What an entry is called: the part behind the colon of one from outside."""
    return name.rpartition(":")[2]
