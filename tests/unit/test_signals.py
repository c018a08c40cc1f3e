"""Who answers SIGINT, SIGTERM and SIGHUP; that no standard stream ends a command. In processes of their own, without JAX."""

import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.bench.interrupts import check_commit, heeds
from jaxcl.errors import UserError
from jaxcl.signals import IMPATIENT, STATUS
from tests.whole import REPO

BEGIN = """
import os, signal, sys, time
from jaxcl import signals
signals.own()
signals.wait_at_most({limit})
def ready():
    print("ready", flush=True)
def deaf():  # as in C++, where Python runs no handler
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.STATUS)
    ready()
    time.sleep(60)
"""
NOTHING = "{name}: told to stop while there was nothing to save; start again"
TRAIN = """
with signals.Preemption(saving=lambda: saving) as run:
    run.unsaved, saving = True, False
    ready()
    while not run.asked:
        time.sleep(0.01)
"""
SAVE = """
    saving = True
    time.sleep(2)
    print(run.stopped("saved at step 3"), flush=True)
    os._exit(run.stopped("").status)
"""


@pytest.fixture(autouse=True)
def not_ignored():
    """Under nohup the tests' processes would inherit that SIGHUP is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def begun(program, limit=60.0, before=()):
    line = [*before, sys.executable, "-c", BEGIN.format(limit=limit) + program]
    process = subprocess.Popen(line, cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    return process


def told(process, *numbers, pause=0.0):
    """What is on standard output, and the error line without its mark, of a process that gets these signals; its status is that
    of the first."""
    for number in numbers:
        process.send_signal(number)
        time.sleep(pause)
    out, errors = process.communicate(timeout=100)
    assert process.returncode == STATUS[numbers[0]], (out, errors)
    assert errors.count("error: ") <= 1 and "Traceback" not in errors
    return out, errors.strip().removeprefix("error: ")


@pytest.mark.parametrize("number", STATUS)
def test_a_process_with_nothing_to_save_ends_at_once(number):
    assert told(begun("deaf()"), number) == ("", NOTHING.format(name=number.name))


def test_also_before_the_first_step_of_a_run():
    assert told(begun("with signals.Preemption():\n    deaf()"), signal.SIGINT)[1] == NOTHING.format(name="SIGINT")


@pytest.mark.parametrize("number", STATUS)
def test_also_while_a_command_imports_what_it_needs(number):
    line = [sys.executable, "-m", "experiments.train"]
    process = subprocess.Popen(line, cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not heeds(process.pid):
        time.sleep(0.001)
    assert told(process, number) == ("", NOTHING.format(name=number.name))


@pytest.mark.parametrize("number", STATUS)
def test_a_run_that_trains_saves_first(number):
    """Longer than it may take without a save."""
    said = f"{number.name}: saved at step 3; start again to continue\n"
    assert told(begun(TRAIN + SAVE, limit=0.5), number) == (said, "")


def test_a_run_that_ends_before_it_is_asked_to_save_does_not_go_on():
    assert told(begun(TRAIN + "time.sleep(60)"), signal.SIGTERM)[1] == NOTHING.format(name="SIGTERM")


def test_a_run_whose_end_says_why_is_left_to_it():
    program = f"try:{TRAIN.replace(chr(10), chr(10) + '    ')}    raise run.stopped('saved')\n"
    program += "except signals.Preempted as error:\n    time.sleep(1)\n    print(error)\n    sys.exit(error.status)"
    assert told(begun(program), signal.SIGHUP)[0] == "SIGHUP: saved; start again to continue\n"


def test_a_run_that_comes_to_no_step_ends_unsaved():
    program = "with signals.Preemption() as run:\n    run.unsaved = True\n    deaf()"
    said = "SIGTERM: came to no save within 0.5 s; start again to continue from the last checkpoint"
    assert told(begun(program, limit=0.5), signal.SIGTERM)[1] == said


def test_a_second_ctrl_c_does_not_wait_and_the_echo_of_the_first_does_nothing():
    twice = told(begun(TRAIN + "    time.sleep(60)"), *[signal.SIGINT] * 2, pause=1.5 * IMPATIENT)
    assert twice[1] == "SIGINT: told twice: not saved; start again to continue from the last checkpoint"
    assert told(begun(TRAIN + SAVE), *[signal.SIGINT] * 2, pause=0.1)[0].startswith("SIGINT: saved")
    assert told(begun(TRAIN + SAVE), *[signal.SIGTERM] * 2, pause=1.5 * IMPATIENT)[0].startswith("SIGTERM: saved")


def test_nohup_is_respected():
    process = begun("deaf()", before=("sh", "-c", """trap '' HUP; exec "$0" "$@" """))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    told(process, signal.SIGTERM)


def test_a_signal_that_another_library_is_told_of_is_not_lost():
    """uvloop, which Orbax uses, takes Python's pipe for signals away as long as it runs."""
    program = (
        "_, other = os.pipe()\nos.set_blocking(other, False)\nsignal.set_wakeup_fd(other)\nready()\ntime.sleep(60)"
    )
    assert told(begun(program), signal.SIGINT)[1] == NOTHING.format(name="SIGINT")


def test_a_pipe_that_nobody_reads_holds_no_process():
    process = begun("os.set_blocking(2, False)\nos.write(2, bytes(10**6))\nos.set_blocking(2, True)\ndeaf()")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=100) == STATUS[signal.SIGINT]
    process.communicate()


SPEAK = """
import os, sys
from jaxcl.cli import streams
streams.open_all()
print("accuracy 51.00 ± 1.41", flush=True)
print("a line", file=sys.stderr)
file = open(sys.argv[1], "w")
assert file.fileno() > 2
print("more", file=sys.stderr)
file.write(streams.lost() or "nothing lost")
file.close()
"""


@pytest.mark.parametrize(
    ("redirected", "lost"),
    [
        (">/dev/full 2>/dev/full", "No space left on device"),
        (">&- 2>&- <&-", "nothing lost"),
        ("2>&1 | true", "nothing lost"),
        (">/dev/null", "nothing lost"),
    ],
)
def test_a_stream_that_cannot_be_written_ends_nothing(redirected, lost, tmp_path):
    line = f'{{ "$0" -c "$1" "$2"; echo $? >"$2.status"; }} {redirected}'
    # `true` has gone before anything is said: Python takes longer to begin.
    subprocess.run(["sh", "-c", line, sys.executable, SPEAK, tmp_path / "said"], cwd=REPO, check=True)
    assert ((tmp_path / "said.status").read_text(), (tmp_path / "said").read_text()) == ("0\n", lost)


def test_an_ascii_terminal_gets_a_question_mark(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    line = [sys.executable, "-c", SPEAK, str(tmp_path / "said")]
    done = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, check=True)
    assert done.stdout == b"accuracy 51.00 ? 1.41\n" and done.stderr == b"a line\nmore\n"


@pytest.mark.parametrize("module", ["jaxcl.__main__", "experiments", "jaxcl.check"])
def test_nothing_that_takes_time_is_imported_before_signals_are_owned(module):
    """What is imported before a command's first line is not covered by its handlers."""
    slow = "jax", "numpy", "absl", "ml_collections", "flax"
    program = f"import sys, {module}; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_storms_compare_runs_of_one_commit():
    a, b = ({"result": {"commit": name, "seed": 0}, "log": []} for name in ("a1", "b2-dirty"))
    check_commit(a, a)
    with pytest.raises(UserError, match=r"^the checkout: it has moved from commit a1 to b2-dirty meanwhile"):
        check_commit(b, a)
