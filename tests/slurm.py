"""A SLURM of one machine for a test: munged, slurmctld and slurmd of its own in a folder, ended with the test. Needs root."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

# Clusters track processes by control groups, which a test has not. Here by process groups: proctrack/linuxproc of SLURM 22.05
# gave a signal of scancel to a plain script, and did not deliver it to these tasks.
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=60
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why it is not started; "" if it can be and is asked for."""
    if not os.environ.get("JAXCL_SLURM"):
        return "JAXCL_SLURM is not set"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if lacking:
        return f"no {', '.join(lacking)}; on Debian: apt install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "needs root"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Slurm:
    """A cluster of this machine.

    Attributes:
      environment: in which the commands find it.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self._servers = folder, []  # type: pathlib.Path, list[subprocess.Popen]
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    def serve(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as log:
            self._servers.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def call(self, *command: str) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job, by name."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def end(self) -> None:
        for server in reversed(self._servers):
            server.send_signal(signal.SIGTERM)
        for server in reversed(self._servers):
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=30)
            server.kill()


def until(condition: Callable[[], Any], seconds: float, what: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.2)


@contextlib.contextmanager
def cluster(folder: pathlib.Path) -> Iterator[Slurm]:
    """Started in `folder`, which must have a short path: it holds a socket."""
    host = socket.gethostname().partition(".")[0]
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        ports = (one.getsockname()[1], other.getsockname()[1])
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, ports=ports, folder=folder))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    found = Slurm(folder)
    try:
        files = (
            f"--{x}={folder}/munge.{y}" for x, y in (("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))
        )
        found.serve("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket", *files)
        until((folder / "munge.socket").exists, 30, lambda: (folder / "munged.out").read_text())
        found.serve("slurmctld", "-D")
        found.serve("slurmd", "-D", "-N", host)

        def ready() -> bool:
            shown = subprocess.run(
                ["sinfo", "--noheader", "--format=%t"], env=found.environment, capture_output=True, text=True
            )
            return shown.stdout.strip() in ("idle", "mix")

        until(ready, 60, lambda: (folder / "slurmctld.log").read_text() + (folder / "slurmd.log").read_text())
        yield found
    finally:
        found.end()
