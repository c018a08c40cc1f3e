"""By what code a run is made: jaxcl's own, and the modules of the user that hold what the config names.

Of jaxcl it is the version and a digest of the package's source. A module of the user is one that holds a strategy, model,
policy, source, scenario, augmentation or metric from outside the package, and whatever that imports of modules that are neither
jaxcl's nor installed. Modules are told by their names, so that a run may move with them to another folder. Of what stands in a
script, a notebook or a config file it is the text of the function alone, since the rest of such a file changes from run to run.
The file of the config is recorded too, but not compared: what it says is compared field by field (`workdir`).
"""

import contextlib
import functools
import hashlib
import inspect
import pathlib
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

import jaxcl
from jaxcl.buffer import EXCHANGES, POLICIES
from jaxcl.data import AUGMENTATIONS, SCENARIOS, SOURCES
from jaxcl.data.sources import parse
from jaxcl.errors import UserError
from jaxcl.metrics import METRICS
from jaxcl.models import MODELS
from jaxcl.registry import Registry
from jaxcl.strategies import STRATEGIES

Code = dict[str, Any]
NAMED: dict[str, Registry] = {
    "strategy": STRATEGIES,
    "model.name": MODELS,
    "buffer.policy": POLICIES,
    "buffer.exchange": EXCHANGES,
    "data.source": SOURCES,
    "data.scenario": SCENARIOS,
    "data.augment": AUGMENTATIONS,
    "eval.metrics": METRICS,
}
_PACKAGE = pathlib.Path(jaxcl.__file__).resolve().parent
_PROGRAMS = (
    "__main__",
    "config_config",
    "config_file",
)  # a script, a config: of what they hold the function alone counts
_INSTALLED = tuple({pathlib.Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "purelib", "platlib")})


def code_of(config: ConfigDict) -> Code:
    """{"jaxcl": version, "digest": of its source, "modules": {name: digest}, "config_file": {name: digest}}, for JSON."""
    found: dict[str, str] = {}
    for make in _from_outside(config):
        found |= _modules(make)
    # Where ml_collections puts the file of a flag called config.
    given = getattr(sys.modules.get("config_config"), "__file__", None)
    file = {} if given is None else {pathlib.Path(given).name: _digest(pathlib.Path(given).read_bytes())}
    return {"jaxcl": jaxcl.__version__, "digest": own_digest(), "modules": found, "config_file": file}


@functools.cache
def own_digest() -> str:
    """Of the package's source, whatever folder it lies in."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        name = path.relative_to(_PACKAGE).as_posix()
        if not name.startswith("configs/"):  # in an installed package alone
            digest.update(f"{name}\0{_digest(path.read_bytes())}\n".encode())
    return digest.hexdigest()[:16]


def changed_modules(theirs: Code, mine: Code) -> str:
    """The user's modules that differ, in words; "" if none does."""
    there, here = theirs["modules"], mine["modules"]
    names = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    return ", ".join(f"{name} is {there.get(name, 'none')} there, {here.get(name, 'none')} here" for name in names)


def _from_outside(config: ConfigDict) -> Iterator[Callable]:
    """What the config names that is no file of the package; a name that is wrong is told by who uses it."""
    for field, registry in NAMED.items():
        names: Any = config
        for part in field.split("."):
            names = names.get(part) if isinstance(names, ConfigDict) else None
        for name in [names] if isinstance(names, str) else names or ():
            with contextlib.suppress(UserError):
                make = registry.from_outside(parse(name)[0] if registry is SOURCES else name)
                if make is not None:
                    yield make


def _modules(make: Callable) -> dict[str, str]:
    """The module that holds a function, and those that it imports, but for what is installed: digests by name."""
    while isinstance(make, functools.partial):
        make = make.func
    first = inspect.getmodule(make)
    if first is None or _file(first) is None or first.__name__ in _PROGRAMS:  # in a notebook there is no file
        try:
            return {f"{make.__module__}:{make.__name__}": _digest(inspect.getsource(make).encode())}
        except (OSError, TypeError):
            return {}
    found: dict[str, str] = {}
    todo = [first]
    while todo:
        module = todo.pop()
        path = _file(module)
        if path is None or module.__name__ in found or path.is_relative_to(_PACKAGE):
            continue
        if module is not first and any(path.is_relative_to(folder) for folder in _INSTALLED):
            continue
        found[module.__name__] = _digest(path.read_bytes())
        todo += [other for value in list(vars(module).values()) if (other := _module_of(value)) is not None]
    return found


def _module_of(value: Any) -> types.ModuleType | None:
    """A module itself, or that of a class or a function, jitted ones included."""
    if isinstance(value, types.ModuleType):
        return value
    return sys.modules.get(str(getattr(value, "__module__", ""))) if callable(value) else None


def _file(module: types.ModuleType) -> pathlib.Path | None:
    """Where its source lies, if it has any."""
    path = getattr(module, "__file__", None)
    return pathlib.Path(path).resolve() if path and path.endswith(".py") and pathlib.Path(path).is_file() else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
