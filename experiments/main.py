"""What the mains share: the flags of a run, the start of JAX, and one line instead of a traceback for a mistake."""

import os
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from jaxcl import mesh
from jaxcl.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "config file, e.g. configs/digits.py")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
DEVICES = flags.DEFINE_integer("devices", None, "fake CPU devices; default: the devices JAX finds (GPU, TPU, CPU)")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "remove what an earlier run left in the workdir")


def required(flag: flags.FlagHolder) -> Any:
    """The flag's value.

    Raises:
      UserError: it was not given.
    """
    if flag.value is None:
        raise UserError(f"--{flag.name}: missing")
    return flag.value


def run(main: Callable[..., None], *, positional: bool = False) -> None:
    """Parses the flags, starts JAX on the devices asked for and calls `main`, with the positional arguments if it takes any.

    A mistake ends the program with one line on standard error and status 2.
    """

    def start(argv: list[str]) -> None:
        try:
            if len(argv) > 1 and not positional:
                raise UserError(f"argument {argv[1]!r} is not understood; flags have the form --name=value")
            if DEVICES.value is not None:
                mesh.use_fake_devices(DEVICES.value)
            main(argv[1:]) if positional else main()
        except UserError as error:
            sys.exit(_say(error))

    logging.set_verbosity(logging.WARNING)
    app.run(start, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """absl's parser; a flag or a config field that does not exist, and a config file that is not there, cost one line."""
    for argument in argv:
        name, _, path = argument.partition("=")
        if name.lstrip("-") == "config" and not os.path.isfile(path.partition(":")[0]):
            sys.exit(_say(UserError(f"--config: there is no file {path}")))
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, ValueError) as error:
        sys.exit(_say(error))


def _say(error: Exception) -> int:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    print("error: " + " ".join(str(text).split()), file=sys.stderr)
    return 2
