"""Data-parallel continual learning in JAX with a distributed rehearsal buffer.

    jaxcl COMMAND [--flag=value ...]
    jaxcl COMMAND --help
    jaxcl --version

The same is `python -m jaxcl COMMAND`. A command is a file of `jaxcl/commands`.
"""

import importlib
import pathlib
import sys
import types

import jaxcl
from jaxcl import shipped, signals
from jaxcl.check import near

COMMANDS = pathlib.Path(__file__).parent / "commands"


def main() -> None:
    """Runs the command that the first argument names."""
    signals.own()  # before anything that takes time is imported
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    known = sorted(path.stem for path in COMMANDS.glob("*.py") if path.stem != "__init__")
    if name in ("-h", "-help", "--help", "help"):
        width = max(map(len, known))
        print((__doc__ or "").strip(), "\n")
        print("\n".join(f"    {x:{width}}  {shipped.first_line(COMMANDS / f'{x}.py')}" for x in known))
    elif name == "--version":
        print(f"jaxcl {jaxcl.__version__}")
    elif name not in known:
        print(f"error: {name!r} is no command; {near(name, known)}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = [f"jaxcl {name}", *rest]
        _imported(name).command()


def _imported(name: str) -> types.ModuleType:
    """The module of a command; where a package is not installed, one line says how to get it."""
    try:
        return importlib.import_module(f"jaxcl.commands.{name}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("jaxcl"):
            raise
        print(f"error: jaxcl {name} needs {error.name}, which is not installed: {jaxcl.INSTALL}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
