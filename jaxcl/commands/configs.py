"""Lists the configs that are shipped, or copies one out, to be changed.

jaxcl configs
jaxcl configs --copy=NAME [--to=DIR]

`--config=NAME` uses a shipped config from anywhere, `--config=NAME:ARGUMENT` with an argument of its own; a copy is given as a
file, `--config=NAME.py`. A file that is there is not replaced.
"""

import os
import pathlib

from absl import flags

from jaxcl import cli, shipped
from jaxcl.errors import UserError

COPY = flags.DEFINE_string("copy", None, "name of a config to copy")
TO = flags.DEFINE_string("to", ".", "folder to copy it into, made if needed")


def main() -> None:
    if COPY.value is not None:
        print(copy(COPY.value, pathlib.Path(TO.value)))
        return
    width = max(map(len, shipped.names()))
    for name in shipped.names():
        print(f"{name:{width}}  {shipped.about(name)}")


def copy(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Copies a config into a folder -> its file.

    Raises:
      UserError: there is no such config, or the file is there or cannot be written.
    """
    source, target = shipped.path_of(name), folder / f"{name}.py"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(source.read_bytes())
    except FileExistsError:
        raise UserError(f"--to: {target} is there already; remove it or give another folder") from None
    except OSError as error:
        raise UserError(f"--to: {target} cannot be written: {error.strerror}") from None
    return target


def command() -> None:
    cli.run(main, takes=(COPY, TO))
