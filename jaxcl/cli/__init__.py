"""What the commands share: the flags of a run, the start of JAX, and one line instead of a traceback for a mistake."""

import functools
import logging
import os
import pathlib
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from jaxcl import compilation, mesh, shipped, signals
from jaxcl import fields as fields_lib
from jaxcl.check import NOT_NEGATIVE, POSITIVE, Rule, at_least, between, check
from jaxcl.cli import streams
from jaxcl.cli.config_file import brief, explain
from jaxcl.cli.config_file import from_config_file as from_config_file
from jaxcl.errors import PeerLost, RunError, UserError
from jaxcl.training import config as training

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a config that is shipped, such as digits, or a file, such as mine.py; behind a colon its argument"
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
JSON = flags.DEFINE_string(
    "json",
    None,
    "of predict: file to write, - for standard output; of a benchmark: also a picture beside it; default: print only",
)
OUT = flags.DEFINE_string("out", None, "file or folder to write, as the command's text says")
DEVICES = flags.DEFINE_integer("devices", None, "fake CPU devices of this process; default: the devices JAX finds")
SEEDS = flags.DEFINE_integer(
    "seeds", None, "runs of each kind, with seeds from config.seed upwards; default: as the command's text says"
)
VMAP = flags.DEFINE_bool("vmap", False, "train seeds that differ in nothing else together, as one program")
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
START = flags.DEFINE_float(
    "start_seconds",
    600.0,
    "one of several processes: end when they have not met, begun to train or, compilation included, finished a first step "
    "for so long; 0: never",
)
STALL = flags.DEFINE_float(
    "stall_seconds", 600.0, "one of several processes: end when no step was finished for so long; 0: never"
)
STOP = flags.DEFINE_float(
    "stop_seconds",
    8.0,
    "how long a run that is told to stop may take to come to a step where it saves, before it ends unsaved",
)
CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "folder that keeps compiled programs, or off; default: JAX_COMPILATION_CACHE_DIR, else in the user's cache folder",
)
HELP_CONFIG = flags.DEFINE_bool("help_config", False, "print every field of the config and end")

# The flags of a command that makes runs.
RUN: tuple[flags.FlagHolder, ...] = (
    *(CONFIG, WORKDIR, DEVICES, OVERWRITE, CACHE, HELP_CONFIG),
    *(DISTRIBUTED, COORDINATOR, NUM_PROCESSES, PROCESS_ID, HEARTBEAT, START, STALL, STOP),
)
MOST_DEVICES = 512  # a step of 1,000 takes a minute to start or aborts in XLA's CPU runtime, 100,000 never start


def _is_address(text: Any) -> bool:
    found = re.fullmatch(r"(\[[\da-fA-F:.]+\]|[^\s:/]+):(\d{1,5})", text)
    return found is not None and 0 < int(found[2]) < 2**16


RULES = (
    (DEVICES, between(1, MOST_DEVICES)),
    (START, NOT_NEGATIVE),
    (STALL, NOT_NEGATIVE),
    (STOP, NOT_NEGATIVE),
    (HEARTBEAT, POSITIVE),
    (NUM_PROCESSES, POSITIVE),
    (PROCESS_ID, NOT_NEGATIVE),
    (COORDINATOR, Rule(_is_address, "HOST:PORT with a port from 1 to 65535")),
)


def required(flag: flags.FlagHolder) -> Any:
    """The flag's value.

    Raises:
      UserError: it was not given.
    """
    if flag.value in (None, ""):
        raise UserError(f"--{flag.name}: missing")
    return flag.value


def config_and_workdir() -> tuple[Any, pathlib.Path]:
    """What nearly every command needs: both are `required`."""
    return required(CONFIG), pathlib.Path(required(WORKDIR))


def run_options() -> dict[str, Any]:
    """Of `train_and_evaluate`: what the flags say beside config and workdir."""
    return {"overwrite": OVERWRITE.value, "start_seconds": START.value, "stall_seconds": STALL.value}


def seeds(default: int, least: int = 1) -> int:
    """--seeds, or the command's default. The flag is defined here for all, so that commands can be imported together.

    Raises:
      UserError: fewer than `least`.
    """
    asked = default if SEEDS.value is None else SEEDS.value
    check("--seeds", asked, at_least(least))
    return asked


def config_path() -> str:
    """What was given to --config: a file, and behind a colon the argument of its functions, if there is one."""
    return config_flags.get_config_filename(flags.FLAGS["config"])


def run(
    main: Callable[..., None],
    *,
    positional: bool = False,
    takes: Sequence[flags.FlagHolder] | None = None,
    fields: fields_lib.Fields | None = None,
) -> None:
    """Parses the flags, starts JAX on the devices asked for and calls `main`, with the positional arguments if it takes any.

    A mistake or a failed run ends the program with one line on standard error and the status of its exception. One process
    of several ends at once, whatever went wrong: it does not wait for the others, which may be waiting for it.

    Args:
      takes: the flags of the command: --help lists them, and another one is a mistake; None: those of all commands.
      fields: of the command's config, for --help_config; None: those of `jaxcl.training.config`.
    """

    def start(argv: list[str]) -> None:
        try:
            if HELP_CONFIG.value:
                print(fields_lib.text(fields or training.fields(), shutil.get_terminal_size((120, 0)).columns))
                return
            _begin(argv, positional, takes)
            main(argv[1:]) if positional else main()
        except (UserError, RunError) as error:
            _end(_say(error))
        except Exception as error:
            traceback.print_exc()
            if jax.distributed.is_initialized() and isinstance(error, jax.errors.JaxRuntimeError):
                cause = " ".join(str(error).split())[:300]
                error = PeerLost(
                    f"another process has died, or the computation itself failed: {cause}; start again to continue"
                )
                _end(_say(error))
            _end(1)
        if why := streams.lost():
            print(f"warning: standard output is not whole: {why}", file=sys.stderr)
        if not jax.distributed.is_initialized():  # else its end, which waits for the other processes, is to come
            _end(0)

    signals.own()
    streams.open_all()
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs, with tracebacks, what it also raises
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable
    app.run(start, flags_parser=functools.partial(_parse, main.__module__, takes=takes))


def _begin(argv: list[str], positional: bool, takes: Sequence[flags.FlagHolder] | None = None) -> None:
    """Checks the flags that every command has, and starts JAX as they say."""
    if len(argv) > 1 and not positional:
        raise UserError(f"argument {argv[1]!r} is not understood; flags have the form --name=value")
    for given in flags.FLAGS.get_flags_for_module(__name__):
        name = given.name.partition(".")[0]  # --config.FIELD
        if given.present and takes is not None and name not in {one.name for one in takes}:
            raise UserError(f"--{given.name}: not a flag of this command; --help lists them")
    for flag, rule in RULES:
        if flag.value is not None:
            check(f"--{flag.name}", flag.value, rule)
    signals.wait_at_most(STOP.value)
    compilation.use(CACHE.value)
    if DEVICES.value is not None:
        mesh.use_fake_devices(DEVICES.value)
    explicit = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if DISTRIBUTED.value or any(value is not None for value in explicit):
        mesh.join_processes(*explicit, heartbeat_seconds=HEARTBEAT.value, start_seconds=START.value)
    _log_lines()


def _log_lines() -> None:
    """The library's own lines go to standard error as they are; in a run of several processes with the process's number."""
    who = f"process {jax.process_index()} of {jax.process_count()}: " if jax.distributed.is_initialized() else ""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{who}%(message)s"))
    log = logging.getLogger("jaxcl")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _report_unraisable(unraisable: Any) -> None:
    """What C++ threads of a save that has failed print by the dozen is left out; the command says one line of it."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _end(status: int) -> NoReturn:
    """Without the interpreter's own end: it waits for the other processes, and crashes where C++ threads still run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _help(command: str, takes: Sequence[flags.FlagHolder] | None) -> str:
    """The text of a command's module, and a flag a paragraph."""
    found = [flags.FLAGS[flag.name] for flag in takes or ()]
    if takes is None:
        own = sys.argv[0] if command == "__main__" else command  # as absl calls them
        found = [*flags.FLAGS.get_key_flags_for_module(own), *flags.FLAGS.get_key_flags_for_module(__name__)]
    blocks = [(sys.modules[command].__doc__ or "").strip(), "flags:"]
    width = shutil.get_terminal_size((120, 0)).columns
    for flag in found:
        name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
        default = "" if flag.default in (None, False) else f" (default: {flag.default})"
        text = f"{name}: {' '.join((flag.help or '').split())}{default}"
        blocks.append(textwrap.fill(text, width, initial_indent="  ", subsequent_indent="      "))
    if CONFIG.name in {flag.name for flag in found}:
        blocks.append("  --config.FIELD=VALUE: any field of the config; --help_config lists them")
    return "\n".join([f"{blocks[0]}\n", *blocks[1:]])


def _parse(command: str, argv: list[str], takes: Sequence[flags.FlagHolder] | None = None) -> list[str]:
    """absl's parser, for the module of a command. A flag or a config field that does not exist, and a config file that is not
    there or fails, cost one line; --help prints the command's text and its flags, and is no failure."""
    if {"-h", "-help", "--help", "--helpshort", "--helpfull"} & set(argv[1:]):
        print(_help(command, takes))
        sys.exit(0)
    path = _given_config(argv)
    _find_modules(os.getcwd())
    try:
        if path is not None:
            argv, path = _with_file(argv, path)
        rest = flags.FLAGS(argv)
        if path is not None and not isinstance(CONFIG.value, ConfigDict):
            explain(path, argv)
        return rest
    except UserError as error:
        sys.exit(_say(error))
    except (Exception, SystemExit) as error:  # a config file may end the program
        try:
            if path is not None:
                explain(path, argv)
        except UserError as better:
            sys.exit(_say(better))
        sys.exit(_say(error))


def _given_config(argv: list[str]) -> str | None:
    """The value of --config, before the flags are parsed."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("-config", "--config"):
            return value if equals else following
    return None


def _with_file(argv: list[str], given: str) -> tuple[list[str], str]:
    """The arguments with the file of the config that is `given`, by name or as a file, and this file with its argument.

    Raises:
      UserError: there is no such config.
    """
    name, colon, argument = given.partition(":")
    if re.fullmatch(r"\w+", name):
        path = str(shipped.path_of(name)) + colon + argument
    elif os.path.isfile(name):
        path = given
        _find_modules(os.path.dirname(os.path.abspath(name)))
    else:
        raise UserError(f"--config: there is no file {given}")
    before = ["", *argv]
    named = [f"--config={path}" if re.match("--?config=", x) else x for x in argv]
    return [path if re.fullmatch("--?config", before[i]) else x for i, x in enumerate(named)], path


def _find_modules(folder: str) -> None:
    """Lets modules of a folder be imported, so that a config can name a strategy of the user's own `module:name`; what is
    installed comes first."""
    if folder not in sys.path:
        sys.path.append(folder)


def _say(error: BaseException) -> int:
    """Prints one line and returns the exit status."""
    print(f"error: {brief(error)}", file=sys.stderr)
    return getattr(error, "status", 2)
