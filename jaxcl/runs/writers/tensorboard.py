"""TensorBoard events in the run's folder, with the config for the hyper-parameters' page: `tensorboard --logdir DIR`."""

import contextlib
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from jaxcl.runs.writers.base import Setting, Writer

MARK = ".jaxcl"  # the end of the name of our events: a folder may hold those of others
EVENTS = f"events.out.*{MARK}"
# By which runs are compared beside their hyper-parameters; those that a run does not have stay empty.
SUMMARIES = tuple(f"evaluation/{name}" for name in ("accuracy", "top5", "error", "forgetting"))


def tensorboard(folder: pathlib.Path, settings: Mapping[str, Setting], step: int | None) -> Writer:
    """Behind `step`, TensorBoard hides what an earlier session has written."""
    # Not its SummaryWriter: the thread of that dies of a full disk, with a trace, and who writes then waits for ever.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import SessionLog
    from tensorboardX.summary import hparams

    writer = _Events(EventsWriter(str(folder / "events"), MARK))
    if step is not None:
        writer.add(step=step + 1, session_log=SessionLog(status=SessionLog.START))
    experiment, start, _ = hparams(dict(settings), dict.fromkeys(SUMMARIES, 0.0))
    writer.add(summary=experiment)
    writer.add(summary=start)
    return writer


class _Events:
    def __init__(self, file: Any) -> None:
        self._file = file

    def add(self, **event: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(wall_time=time.time(), **event))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in scalars.items():
            self.add(step=step, summary=scalar(name, value))
        self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # on a full disk: what ended the run has been said
            self._file.close()
