"""The configs that come with jaxcl, by name: in an installed package they lie in `jaxcl/configs`, in a checkout beside `jaxcl`.

A config file may use another one as `shipped.load(NAME)`, which works from both places and from a copy of the file elsewhere.
"""

import ast
import importlib.util
import pathlib
import sys
import types

import jaxcl
from jaxcl.check import near
from jaxcl.errors import UserError

_PACKAGE = pathlib.Path(jaxcl.__file__).resolve().parent
FOLDER = next((x for x in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if x.is_dir()), _PACKAGE / "configs")


def names() -> list[str]:
    """Of all configs."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def path_of(name: str) -> pathlib.Path:
    """The file of a config.

    Raises:
      UserError: there is none of this name.
    """
    if name not in names():
        raise UserError(f"--config: no config called {name!r} is shipped; {near(name, names())}")
    return FOLDER / f"{name}.py"


def about(name: str) -> str:
    """What a config is, on one line: the first of its text."""
    return first_line(path_of(name))


def first_line(path: pathlib.Path) -> str:
    """The first line of a module's text, which is not run."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def load(name: str) -> types.ModuleType:
    """The module of a config, loaded once.

    Raises:
      UserError: there is none of this name.
    """
    path, full = path_of(name), f"jaxcl.configs.{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[full] = module
    return sys.modules[full]
