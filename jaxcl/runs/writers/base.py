"""What a writer is, and the writers of a run, of which none can end it."""

import functools
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from jaxcl.registry import Registry

Setting: TypeAlias = str | bool | int | float
_log = logging.getLogger("jaxcl")


class Writer(Protocol):
    """Takes the scalars of a run as they come."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """`scalars` by names such as "train/loss"; the steps never descend."""

    def close(self) -> None:
        """The run ends, or is interrupted."""


WRITERS: Registry[Callable[[pathlib.Path, Mapping[str, Setting], int | None], Writer]] = Registry(
    "writers", "jaxcl.runs.writers"
)


class Writers:
    """The writers of a run. One that fails, at its start or later, is left out from then on, and one line says so.

    Args:
      names: of `WRITERS`.
      folder, settings, step: see `jaxcl.runs.writers`.
    """

    def __init__(
        self, names: Sequence[str], folder: pathlib.Path, settings: Mapping[str, Setting], step: int | None
    ) -> None:
        self._open: dict[str, Writer] = {}
        for name in names:
            self._try(name, functools.partial(self._start, name, folder, settings, step))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, writer in list(self._open.items()):
            self._try(name, functools.partial(writer.write, step, scalars))

    def close(self) -> None:
        for name, writer in list(self._open.items()):
            self._try(name, writer.close)
        self._open.clear()

    def _start(self, name: str, *given: Any) -> None:
        self._open[name] = WRITERS[name](*given)

    def _try(self, name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is: the run does not depend on it
            self._open.pop(name, None)
            what = " ".join(f"{type(error).__name__}: {error}".split())
            _log.warning("writers: %s has failed and is left out; the run goes on (%s)", name, what)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Setting]:
    """The fields of a config by their names with dots; of lists their JSON; those that are None are left out."""
    found: dict[str, Setting] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value if isinstance(value, str | bool | int | float) else json.dumps(value)
    return found
