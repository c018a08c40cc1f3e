"""The commands: imported together, one line for every mistake, --help, Ctrl-C, a terminal of ASCII."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]
COMMANDS = ("train", "compare", "sweep", "report", "pairs", "scenario")
DIGITS = "--config=configs/digits.py"


def python(*arguments, **environment):
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=REPO,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"COLUMNS": "100"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    return process


def ended(process):
    out, errors = process.communicate(timeout=300)
    return process.returncode, out.decode(), errors.decode()


def parsed(*arguments):
    """What a command says of these arguments: several in one process, since each start costs seconds."""
    program = """
import sys
import logging
from absl import flags
from experiments import cli
from jaxcl.errors import UserError
logging.disable(logging.WARNING)  # as cli.run does it
for line in sys.argv[1:]:
    cli.flags.FLAGS.unparse_flags()
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    sys.modules.pop("config_config", None)
    argv = sys.argv = ["command", *line.split(" ")]
    try:
        cli._begin(cli._parse(argv), positional=False)
    except UserError as error:
        sys.exit_code = cli._say(error)
    except SystemExit as end:
        assert end.code == 2, end.code
    else:
        print("passed", file=sys.stderr)
"""
    status, _, errors = ended(python("-c", program, *arguments))
    assert status == 0, errors
    return errors.splitlines()


def test_all_commands_are_imported_together():
    program = "".join(f"import experiments.{name}\n" for name in COMMANDS)
    assert ended(python("-c", program))[0] == 0


def test_help_is_no_failure():
    status, out, errors = ended(python("-m", "experiments.compare", "--help"))
    assert status == 0 and not errors
    assert out.startswith("Trains several strategies") and "--strategies:" in out and "--[no]vmap:" in out
    status, out, errors = ended(python("-m", "experiments.train", "--help_config"))
    assert status == 0 and not errors and max(map(len, out.splitlines())) <= 100 + len("--config.")
    assert "--config.buffer.capacity=200\n    rows in the union of all devices' shards (int: a positive number)" in out
    status, out, errors = ended(python("-m", "experiments.pairs", "--help_config"))
    assert status == 0 and "--config.bank.capacity=1024" in out


FILES = {
    "syntax": ("import os\n\ndef get_config(:\n    pass\n", ":3: SyntaxError: invalid syntax"),
    "zero": ("def get_config():\n    x = 0\n    return 1 / x\n", ":3: ZeroDivisionError: division by zero"),
    "type": (
        "from configs import digits\ndef get_config():\n    config = digits.get_config()\n    config.batch_size = 'a'\n",
        ":4: TypeError: Could not override field 'batch_size' (reference). a is of original type <class 'str'>",
    ),
    "key": ("def get_config():\n    return {}['a']\n", ":2: KeyError: a"),
    "os": ("def get_config():\n    return open('/nowhere/x')\n", ":2: FileNotFoundError: "),
    "import": ("import nothing_there\n", ":1: ModuleNotFoundError: No module named 'nothing_there'"),
    "none": ("def get_config():\n    return None\n", " has no get_config() that returns a ConfigDict"),
    "no function": ("x = 1\n", " has no get_config() that returns a ConfigDict"),
}


def test_a_config_file_that_fails_costs_one_line(tmp_path):
    """The file, the line and the message."""
    paths = {name: tmp_path / f"{name.replace(' ', '_')}.py" for name in FILES}
    for name, (text, _) in FILES.items():
        paths[name].write_text(text)
    lines = parsed(*(f"--config={path}" for path in paths.values()), f"--config={paths['os']} --config.batch_size=3")
    wanted = [f"error: --config: {path}{FILES[name][1]}" for name, path in paths.items()]
    wanted.append(wanted[list(paths).index("os")])
    assert [line[: len(want)] for line, want in zip(lines, wanted, strict=True)] == wanted


MISTAKES = {
    f"{DIGITS}:foo": "--config: configs/digits.py: get_config() takes no argument 'foo'",
    "--config configs/digits.py:foo": "--config: configs/digits.py: get_config() takes no argument 'foo'",
    "--config=configs/split_cifar10.py:foo": "--config=configs/split_cifar10.py:foo: no such size",
    "--config=configs/nowhere.py": "--config: there is no file configs/nowhere.py",
    f"{DIGITS} --config.model.options.foo=3": "--config.model.options.foo: no such field; allowed are hidden",
    f"{DIGITS} --config.bufer.capacity=3": "--config.bufer.capacity: no such field; did you mean buffer?",
    f"{DIGITS} --config.seed.a=3": "--config.seed.a: no such field",
    f"{DIGITS} --config.batch_size=many": "flag --config.batch_size=many: invalid literal",
    "--stall_seconds=nan": "--stall_seconds: nan is not allowed, give 0 or more",
    "--stall_seconds=-1": "--stall_seconds: -1.0 is not allowed",
    "--heartbeat_seconds=0": "--heartbeat_seconds: 0 is not allowed",
    "--devices=0": "--devices: 0 is not allowed, give a number from 1 to 512",
    "--devices=1000": "--devices: 1000 is not allowed, give a number from 1 to 512",
    "--devices=100000": "--devices: 100000 is not allowed",
    "--coordinator=here": "--coordinator: 'here' is not allowed, give HOST:PORT with a port from 1 to 65535",
    "--coordinator=here:0": "--coordinator: 'here:0' is not allowed",
    "--coordinator=here:70000": "--coordinator: 'here:70000' is not allowed",
    "--coordinator=:80": "--coordinator: ':80' is not allowed",
    "--coordinator=here:80": "--num_processes: missing",  # the address itself is right
    "--coordinator=[::1]:80": "--num_processes: missing",
    "er": "argument 'er' is not understood",
}


def test_a_mistake_costs_one_line():
    lines = parsed(*MISTAKES)
    wanted = [f"error: {message}" for message in MISTAKES.values()]
    assert [line[: len(want)] for line, want in zip(lines, wanted, strict=True)] == wanted
    assert parsed(f"{DIGITS} --config.buffer.capacity=300 --stall_seconds=0") == ["passed"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("report",), "error: DIR: missing; give at least one folder of runs"),
        (("report", "nowhere"), "error: run folder: 'nowhere' is not a folder"),
        (("compare", DIGITS, "--workdir=/nowhere/x", "--strategies=er,er"), "error: --strategies: ['er', 'er'] is not"),
        (("scenario", DIGITS, "--out=x.jpg"), "error: --out: 'x.jpg' is not allowed, give a name that ends with .png"),
    ],
    ids=str,
)
def test_commands_end_with_2_for_a_mistake(command, message):
    status, _, errors = ended(python("-m", f"experiments.{command[0]}", *command[1:]))
    assert status == 2 and errors.startswith(message) and errors.count("\n") == 1


def test_a_damaged_run_is_told_in_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_bytes(b"\xff\xfe{")
    status, out, errors = ended(python("-m", "experiments.report", tmp_path))
    assert status == 0 and "malformed result.json" in out.splitlines()[0] and not errors


def test_an_ascii_terminal_gets_a_question_mark():
    program = "from experiments import cli; cli.run(lambda: print('51.00 ± 1.41'))"
    assert ended(python("-c", program, PYTHONIOENCODING="ascii")) == (0, "51.00 ? 1.41\n", "")


def interrupted(program, times):
    """Exit status and standard error of a program that is interrupted so many times after it has said that it is there."""
    process = python("-c", program)
    assert process.stdout is not None and process.stdout.readline() == b"there\n"
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    status, _, errors = ended(process)
    return status, errors


LINE = "error: interrupted; start again to continue from the last checkpoint\n"
SLEEP = "print('there', flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    "program",
    [
        "def main():\n    {sleep}",
        "def main():\n    try:\n        {sleep}\n    finally:\n        time.sleep(2)",
        "def last():\n    {sleep}\natexit.register(last)\ndef main(): pass",
        "def last():\n    {sleep}\natexit.register(last)\ndef main(): raise UserError('no')",
    ],
    ids=["once", "twice", "at the end", "at the end of a mistake"],
)
def test_ctrl_c_prints_one_line(program):
    begin = "import atexit, time\nfrom experiments import cli\nfrom jaxcl.errors import UserError\n"
    status, errors = interrupted(
        begin + program.format(sleep=SLEEP) + "\ncli.run(main)", 2 if "finally" in program else 1
    )
    assert status == 130 and errors.removeprefix("error: no\n") == LINE
