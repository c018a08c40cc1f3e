"""What the mains share: the flags of a run, the start of JAX, and one line instead of a traceback for a mistake."""

import pathlib
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from jaxcl import mesh
from jaxcl.errors import UserError
from jaxcl.training.config import unknown_field

CONFIG = config_flags.DEFINE_config_file("config", None, "config file, e.g. configs/digits.py", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
DEVICES = flags.DEFINE_integer("devices", None, "fake CPU devices; default: the devices JAX finds (GPU, TPU, CPU)")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "remove what an earlier run left in the workdir")


def required(flag: flags.FlagHolder) -> object:
    """The flag's value.

    Raises:
      UserError: it was not given.
    """
    if flag.value is None:
        raise UserError(f"--{flag.name}: missing")
    return flag.value


def run(main: Callable[[], None]) -> None:
    """Parses the flags, starts JAX on the devices asked for and calls `main`; mistakes end with one line and status 2."""

    def start(argv: list[str]) -> None:
        try:
            if len(argv) > 1:
                raise UserError(f"argument {argv[1]!r} is not understood; flags have the form --name=value")
            if DEVICES.value is not None:
                mesh.use_fake_devices(DEVICES.value)
            main()
        except UserError as error:
            sys.exit(_say(error))

    logging.set_verbosity(logging.WARNING)
    app.run(start, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with one line for a flag or a config field that does not exist."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(_say(error))
    except (AttributeError, KeyError) as error:
        sys.exit(_say(error))


def _say(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
