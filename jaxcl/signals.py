"""SIGINT, SIGTERM and SIGHUP of a command: a thread of their own answers them, from before JAX is imported.

Python runs handlers in the main thread alone, between two bytecodes: not while XLA compiles or waits for other processes. And
what a handler raises comes up anywhere: in a callback or a finaliser it is dropped, and where it gets through, the interpreter
ends among C++ threads that still run, which crashes. So no handler raises here. While there is nothing to be saved, the thread
ends the process at once; else the run is asked, and ends itself when it has saved (`Preemption`).

Imports nothing that takes time, since what is imported before `own` is called is not covered.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from jaxcl.errors import Preempted

STATUS = {
    signal.SIGINT: 130,
    signal.SIGHUP: 129,
    signal.SIGTERM: Preempted.status,
}  # in the order in which they are owned
TICK = 0.1  # seconds between two looks at a run that was asked
IMPATIENT = 1.0  # seconds; a second SIGINT within them may be the same one, sent on by a launcher

_writer: int | None = None  # of the pipe by which Python tells of signals; None: the process has not called `own`
_limit = 8.0
_entered: "list[Preemption]" = []


class Preemption:
    """Of a run, while entered: once it has something to lose, a signal waits until it is saved.

    In a process that has not called `own`, it does so for SIGTERM, and in the main thread alone.

    Args:
      saving: whether a save is being made; its time does not count for the limit of `own`.

    Attributes:
      asked: the signal that came, to be answered by a save and the end; None as long as none has.
      unsaved: set by the run, when it has taken a step.
    """

    def __init__(self, saving: Callable[[], bool] = lambda: False) -> None:
        self.asked: int | None = None
        self.unsaved, self.saving = False, saving
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if _writer is not None:
            _entered.append(self)
        elif threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        # If it was asked and ends by an exception, the command is about to say so, and to end.
        if self in _entered and (kind is None or self.asked is None):
            _entered.remove(self)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number

    def stopped(self, where: str) -> Preempted:
        """The error to end with, by its signal, after a save; `where` says what was saved."""
        if self.asked is None:  # another process was
            return Preempted(f"told to stop by another process: {where}; start again to continue")
        error = Preempted(f"{signal.Signals(self.asked).name}: {where}; start again to continue")
        error.status = STATUS[signal.Signals(self.asked)]
        return error


def own() -> None:
    """From now on the signals of `STATUS` end this process, with their status and one line. To be called in the main thread.

    SIGHUP stays ignored where it is (nohup). A second SIGINT does not wait for a run to save.
    """
    global _writer
    if _writer is not None:
        return
    reader, _writer = os.pipe()
    os.set_blocking(_writer, False)
    threading.Thread(target=_answer, args=(reader,), name="signals", daemon=True).start()
    signal.set_wakeup_fd(_writer, warn_on_full_buffer=False)
    for number in STATUS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _tell)
            signal.siginterrupt(number, False)  # no system call of a C++ library comes back early


def wait_at_most(seconds: float) -> None:
    """How long a run that was asked may take, saves not counted, before the process ends without it."""
    global _limit
    _limit = seconds


def _tell(number: int, frame: FrameType | None) -> None:
    """Tells the thread of a signal, if Python could not: uvloop, which Orbax uses, takes its pipe away for a while."""
    assert _writer is not None
    at = signal.set_wakeup_fd(_writer, warn_on_full_buffer=False)
    if at != _writer:
        signal.set_wakeup_fd(at, warn_on_full_buffer=False)
        os.write(_writer, bytes([number]))


def _answer(reader: int) -> None:
    """The thread."""
    first, came, waited = None, 0.0, 0.0
    while True:
        if select.select([reader], [], [], None if first is None else TICK)[0]:
            [number] = os.read(reader, 1)
            if number not in STATUS:
                continue
            if first is None:
                first, came = number, time.monotonic()
                for run in list(_entered):
                    run.asked = number
            elif number == signal.SIGINT and time.monotonic() > came + IMPATIENT:
                _end(first, "told twice: not saved; start again to continue from the last checkpoint")
        elif not any(run.saving() for run in list(_entered)):
            waited += TICK
        assert first is not None
        if not any(run.unsaved for run in list(_entered)):
            _end(first, "told to stop while there was nothing to save; start again")
        if waited > _limit:
            _end(first, f"came to no save within {_limit:g} s; start again to continue from the last checkpoint")


def _end(number: int, why: str) -> NoReturn:
    below = "\n" if _entered else ""  # the progress bar
    line = f"{below}error: {signal.Signals(number).name}: {why}\n"
    try:  # a pipe that nobody reads holds who writes to it for ever
        speaker = threading.Thread(target=_say, args=(line,), daemon=True)
        speaker.start()
        speaker.join(1.0)
    finally:
        os._exit(STATUS[signal.Signals(number)])


def _say(line: str) -> None:
    try:
        os.write(2, line.encode())
        sys.stdout.flush()
    except (OSError, ValueError):
        pass
