"""Whole commands: --help, the status of a mistake, Ctrl-C, a full folder."""

import os
import signal
import subprocess
import sys

import pytest

from tests.folders import contents
from tests.whole import REPO

DIGITS = "--config=configs/digits.py"


def python(*arguments, **environment):
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=REPO,
        env=os.environ | {"COLUMNS": "100"} | environment,
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
    assert "--config.FIELD=VALUE:" in out and "--json" not in out and "--out" not in out  # its own flags alone
    assert out.count("jaxcl compare --config=") == 3
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
        (("train", DIGITS, "--seeds=3"), "error: --seeds: not a flag of this command; --help lists them"),
        (("scenario", DIGITS, "--out=x.jpg"), "error: --out: 'x.jpg' is not allowed, give a name that ends with .png"),
    ],
    ids=str,
)
def test_commands_end_with_2_for_a_mistake(command, message):
    status, _, errors = ended(python("-m", f"experiments.{command[0]}", *command[1:]))
    assert status == 2 and errors.startswith(message) and errors.count("\n") == 1


WAYS = [f"--config.buffer.{x}" for x in ("share=0.01", "representatives=8", "selection.by=random", "selection.ways=99")]


@pytest.mark.parametrize(
    ("arguments", "theirs", "message"),
    [
        (["--config.seed=2147483647", "--seeds=2"], "x", "seed: 2147483648 is not allowed, give a whole number from 0"),
        (WAYS, "x", "buffer.selection.ways: 99 is not allowed, give at most 14, the rows of buffer.share = 0.01"),
        ([], "report.html", "out: {}/report.html is not a file of jaxcl; remove it or give another folder"),
        ([], "er/seed_0/notes", "workdir: {}/er/seed_0 holds notes and no run; give a new or an empty folder"),
    ],
    ids=["seed", "ways", "report", "run"],
)
def test_a_comparison_tells_mistakes_before_it_trains(arguments, theirs, message, tmp_path):
    """Also those of its last strategy alone."""
    (tmp_path / theirs).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / theirs).write_text("mine")
    before = contents(tmp_path)
    command = [DIGITS, f"--workdir={tmp_path}", "--strategies=incremental,er", *arguments]
    status, _, errors = ended(python("-m", "experiments.compare", *command))
    assert status == 2 and errors.startswith(f"error: {message.format(tmp_path)}") and errors.count("\n") == 1
    assert contents(tmp_path) == before


def test_a_damaged_run_is_told_in_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_bytes(b"\xff\xfe{")
    status, out, errors = ended(python("-m", "experiments.report", tmp_path))
    assert status == 0 and "result.json is damaged" in out.splitlines()[0] and not errors


def test_ctrl_c_prints_one_line():
    program = "import time\nfrom jaxcl import cli\ndef main():\n    print('there', flush=True)\n    time.sleep(60)\n"
    process = python("-c", program + "cli.run(main)")
    assert process.stdout.readline() == b"there\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "error: SIGINT: told to stop while there was nothing to save; start again\n")


def test_a_report_into_a_full_folder_is_one_line(tmp_path):
    """No file may become longer than 1,000 bytes: EFBIG, as a full disk gives ENOSPC."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{")  # which the page tells of
    begin = "import resource, runpy, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    program = begin + "runpy.run_module('experiments.report', run_name='__main__', alter_sys=True)"
    status, _, errors = ended(python("-c", program, tmp_path))
    assert (status, errors.count("\n")) == (74, 1), errors
    assert errors.startswith(f"error: out: {tmp_path}/report.html cannot be written: File too large; make room")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
