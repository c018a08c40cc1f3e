"""The exceptions that end a program with one line on standard error instead of a traceback, and their exit statuses."""


class UserError(ValueError):
    """Wrong input: names the field, the value and what is allowed. Raised before anything expensive starts."""

    status = 2


class RunError(RuntimeError):
    """What ends a run whose input was right. Statuses are those of sysexits.h, so that a scheduler can tell them apart."""

    status = 1


class Preempted(RunError):
    """The run was told to stop and was saved: start it again to continue."""

    status = 75  # EX_TEMPFAIL, of SIGTERM; each signal has its own, see `jaxcl.signals`


class Diverged(RunError, FloatingPointError):
    """The loss or a parameter is not finite. What was saved before stays."""

    status = 65  # EX_DATAERR


class DataError(RunError):
    """A row of the data cannot be read, while training. What was saved stays."""

    status = 65  # EX_DATAERR


class StorageError(RunError):
    """The workdir cannot be written, for instance because the disk is full. What was saved before stays."""

    status = 74  # EX_IOERR


PEER_LOST = 69  # EX_UNAVAILABLE: another process of the run died or hangs; start it again to continue


class PeerLost(RunError):
    """Another process of the run has died. What was saved before stays."""

    status = PEER_LOST
