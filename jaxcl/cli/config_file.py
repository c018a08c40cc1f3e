"""Config files, run by hand where absl would not say what is wrong with them: the file, the line and the message."""

import importlib.util
import inspect
import os
import re
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jaxcl.check import near
from jaxcl.errors import UserError


def from_config_file(path: str, function: str) -> Any:
    """What a function of a config file returns, called with the argument of get_config if there is one; None where the file
    has no such function. A file that --config has loaded is not run again.

    Args:
      path: as given to --config.

    Raises:
      UserError: the file cannot be loaded, or the function fails or takes no such argument.
    """
    file, colon, argument = path.partition(":")
    arguments = [argument] if colon else []
    try:
        call = getattr(_module(file), function, None)
        if call is None:
            return None
        _check_arguments(call, arguments)
        return call(*arguments)
    except UserError as error:
        raise error if str(error).startswith("--config") else UserError(f"--config: {file}: {error}") from None
    except (Exception, SystemExit) as error:  # a config that ends the program: with a line too
        raise UserError(f"--config: {file}:{_line(error, file)}: {type(error).__name__}: {brief(error)}") from None


def _module(file: str) -> types.ModuleType:
    loaded = sys.modules.get("config_config")  # where ml_collections puts the file of a flag called config
    if loaded is not None and loaded.__file__ == file:
        return loaded
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None or spec.loader is None:
        raise UserError("no Python file; its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_arguments(call: Callable[..., Any], arguments: list[str]) -> None:
    try:
        inspect.signature(call).bind(*arguments)
    except TypeError as error:
        given = f"takes no argument {arguments[0]!r}" if arguments else "needs an argument, as FILE:ARGUMENT"
        raise UserError(f"{call.__name__}() {given}: {error}") from None


def _line(error: BaseException, file: str) -> int:
    """Where in the file it happened: the last line of it that was running; 0 if none was."""
    places = [(x.filename, x.lineno) for x in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    lines = [line for name, line in places if os.path.abspath(name) == os.path.abspath(file)]
    return (lines or [0])[-1] or 0


def brief(error: BaseException) -> str:
    """The message alone, on one line."""
    text = error.msg if isinstance(error, SyntaxError) else error.args[0] if isinstance(error, KeyError) else error
    return " ".join(str(text).split())


def explain(path: str, argv: list[str]) -> None:
    """Loads the config of a command line that could not be parsed once more, as absl's errors do not tell where they are from.

    Raises:
      UserError: the file fails or returns no config, or a field that a flag names does not exist.
    """
    config = from_config_file(path, "get_config")
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: {path} has no get_config() that returns a ConfigDict")
    for argument in argv[1:]:
        if not re.match(r"--?config\.", argument):
            continue
        group, name = config, argument.partition("=")[0].partition(".")[2]
        for part in name.split("."):
            allowed = list(group) if isinstance(group, ConfigDict) else []
            if part not in allowed:
                # What a config file does not name of a network's options, absl cannot set.
                more = "; the network's others are set in the config file" if name.startswith("model.options.") else ""
                raise UserError(f"--config.{name}: no such field; {near(part, allowed)}{more}")
            group = group[part]
