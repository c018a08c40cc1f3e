"""Whole commands: --help, the status of a mistake, Ctrl-C, a terminal of ASCII."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.whole import REPO

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


def test_help_is_no_failure():
    status, out, errors = ended(python("-m", "experiments.compare", "--help"))
    assert status == 0 and not errors
    assert out.startswith("Trains several strategies") and "--strategies:" in out and "--[no]vmap:" in out
    status, out, errors = ended(python("-m", "experiments.train", "--help_config"))
    assert status == 0 and not errors and max(map(len, out.splitlines())) <= 100 + len("--config.")
    assert "--config.buffer.capacity=200\n    rows in the union of all devices' shards (int: a positive number)" in out
    status, out, errors = ended(python("-m", "experiments.pairs", "--help_config"))
    assert status == 0 and "--config.bank.capacity=1024" in out


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
    assert status == 0 and "result.json is damaged" in out.splitlines()[0] and not errors


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
