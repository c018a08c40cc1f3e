"""What the mains share: the flags of a run, the start of JAX, and one line instead of a traceback for a mistake."""

import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from jaxcl import mesh
from jaxcl.errors import PeerLost, RunError, UserError
from jaxcl.runs import control

CONFIG = config_flags.DEFINE_config_file("config", None, "config file, e.g. configs/digits.py")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
JSON = flags.DEFINE_string(
    "json", None, "of a benchmark: file to write, and beside it a picture if it draws one; default: print only"
)
DEVICES = flags.DEFINE_integer("devices", None, "fake CPU devices of this process; default: the devices JAX finds")
SEEDS = flags.DEFINE_integer(
    "seeds", None, "runs of each kind, with seeds from config.seed upwards; default: as the command's text says"
)
OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "remove what an earlier run left in the workdir, instead of continuing it"
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "one of several processes: find the others (TPU pod, SLURM, Open MPI, ...)"
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "one of several processes: HOST:PORT of process 0")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes, with --coordinator")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 100, "end when another process has sent no sign of life for so long"
)
STALL = flags.DEFINE_float(
    "stall_seconds", 600.0, "one of several processes: end when no step was finished for so long; 0: never"
)


def required(flag: flags.FlagHolder) -> Any:
    """The flag's value.

    Raises:
      UserError: it was not given.
    """
    if flag.value is None:
        raise UserError(f"--{flag.name}: missing")
    return flag.value


def seeds(default: int, least: int = 1) -> int:
    """--seeds, or the command's default. The flag is defined here for all, so that commands can be imported together.

    Raises:
      UserError: fewer than `least`.
    """
    asked = default if SEEDS.value is None else SEEDS.value
    if asked < least:
        raise UserError(f"--seeds: {asked} is not allowed, give at least {least}")
    return asked


def from_config_file(path: str, function: str) -> Any:
    """What another function of a config file returns, called with the argument of get_config if there is one; None where the
    file has no such function. `path` as given to --config.

    Raises:
      UserError: the function takes no such argument.
    """
    file, colon, argument = path.partition(":")
    spec = importlib.util.spec_from_file_location("config_file", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        return None
    try:
        return getattr(module, function)(*([argument] if colon else []))
    except TypeError as error:
        raise UserError(f"--config: {file}: {error}") from None


def run(main: Callable[..., None], *, positional: bool = False) -> None:
    """Parses the flags, starts JAX on the devices asked for and calls `main`, with the positional arguments if it takes any.

    A mistake or a failed run ends the program with one line on standard error and the status of its exception. One process
    of several ends at once, whatever went wrong: it does not wait for the others, which may be waiting for it.
    """

    def start(argv: list[str]) -> None:
        control.end_at_sigterm()
        try:
            if len(argv) > 1 and not positional:
                raise UserError(f"argument {argv[1]!r} is not understood; flags have the form --name=value")
            if DEVICES.value is not None:
                mesh.use_fake_devices(DEVICES.value)
            explicit = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
            if DISTRIBUTED.value or any(value is not None for value in explicit):
                mesh.join_processes(*explicit, heartbeat_seconds=HEARTBEAT.value, stall_seconds=STALL.value)
            _log_lines()
            main(argv[1:]) if positional else main()
        except (UserError, RunError) as error:
            _end(_say(error))
        except KeyboardInterrupt:
            _end(_say(RuntimeError("interrupted; start again to continue from the last checkpoint"), 130))
        except Exception as error:
            if jax.distributed.is_initialized():
                traceback.print_exc()
                if isinstance(error, jax.errors.JaxRuntimeError):
                    cause = " ".join(str(error).split())[:300]
                    error = PeerLost(
                        f"another process has died, or the computation itself failed: {cause}; start again to continue"
                    )
                    _end(_say(error))
                _end(1)
            raise

    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs, with tracebacks, what it also raises
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    app.run(start, flags_parser=_parse)


def _log_lines() -> None:
    """The library's own lines go to standard error as they are; in a run of several processes with the process's number."""
    who = f"process {jax.process_index()} of {jax.process_count()}: " if jax.distributed.is_initialized() else ""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{who}%(message)s"))
    log = logging.getLogger("jaxcl")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _end(status: int) -> None:
    if jax.distributed.is_initialized():  # its shutdown, at exit, waits for all processes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


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


def _say(error: Exception, status: int | None = None) -> int:
    """Prints one line and returns the exit status."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    print("error: " + " ".join(str(text).split()), file=sys.stderr)
    return getattr(error, "status", 2) if status is None else status
