"""Compile once: JAX's persistent cache of compiled programs, in the user's cache folder, and what compilation has cost.

JAX names an entry by the program, the devices and the versions, writes it in place, and behind it its time stamp, under a lock
of the folder. A process that is killed in between leaves an entry without a stamp, at which every later write would fail; a
damaged entry would be compiled anew in every process and never replaced. Both are removed here, so that a cache can cost
a run time and a warning, never the run.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import platform
import sys
import warnings
import zlib
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

OFF = "off"  # instead of a folder
BOUND = 2**30  # bytes; the entries used longest ago go first. A bound makes JAX lock the folder
LOCK_SECONDS = 10.0
_ENTRY, _STAMP, _LOCK = "-cache", "-atime", ".lockfile"  # JAX's names
_ZSTD = b"\x28\xb5\x2f\xfd"  # how an entry begins that is not packed by zlib
_EVENTS = {
    "/jax/compilation_cache/compile_requests_use_cache": "requests",
    "/jax/compilation_cache/cache_hits": "cache_hits",
}
_SECONDS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_seconds",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "trace_seconds",
    "/jax/core/compile/backend_compile_duration": "compile_seconds",
}
_log = logging.getLogger("jaxcl")
_counts: dict[str, float] = dict.fromkeys([*_EVENTS.values(), *_SECONDS.values()], 0)


def default_folder() -> pathlib.Path:
    """In the user's cache folder, one for each kind of processor: a program made for one may not run on another."""
    place = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return place / "jaxcl" / "compiled" / _processor()


def use(folder: str | pathlib.Path | None = None) -> None:
    """Programs of this process are kept in this folder, or the user's; "off": nowhere. To be called before the first is made.

    A folder that JAX was told of by JAX_COMPILATION_CACHE_DIR stays. One that cannot be written is done without.
    """
    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder is None and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = default_folder() if folder is None else pathlib.Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder)
    except (OSError, TimeoutError) as error:  # Timeout of the lock is one
        _log.warning("compiled programs are not kept: %s: %s", folder, " ".join(str(error).split()))
        jax.config.update("jax_enable_compilation_cache", False)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", BOUND)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a run has a hundred small programs
    jax.config.update(
        "jax_persistent_cache_enable_xla_caches", "none"
    )  # they know no bound, and name entries by the folder
    _answer_warnings(folder)


def tidy(folder: pathlib.Path, damaged: bool = False) -> None:
    """Removes the entries that a killed process or a full disk has left half written; with `damaged` all that are not whole.

    Raises:
      OSError: the folder cannot be written, or another process keeps it locked for `LOCK_SECONDS`.
    """
    import filelock

    with filelock.FileLock(folder / _LOCK, timeout=LOCK_SECONDS):
        names = set(os.listdir(folder))
        for name in names:
            if not name.endswith(_ENTRY):
                continue
            stamp = name.removesuffix(_ENTRY) + _STAMP
            if stamp not in names or (damaged and not _whole((folder / name).read_bytes())):
                for file in (folder / name, folder / stamp):
                    file.unlink(missing_ok=True)


def spent(since: dict[str, float] | None = None) -> dict[str, float]:
    """What compilation has cost this process so far, or since an earlier answer: programs looked up in the cache and found
    there; seconds to trace programs, and to compile them or read them from the cache."""
    now = dict(_counts)
    return now if since is None else {name: x - since[name] for name, x in now.items()}


def _whole(entry: bytes) -> bool:
    """Whether an entry can be unpacked, as far as this version of Python can tell."""
    if entry.startswith(_ZSTD):
        return True
    try:
        zlib.decompress(entry)
    except zlib.error:
        return False
    return True


def _answer_warnings(folder: pathlib.Path) -> None:
    """What JAX warns of a cache becomes one line of the log, and is mended: before the program is written again."""
    before, told = warnings.showwarning, set[str]()

    def show(message: Any, *args: Any, **more: Any) -> None:
        text = " ".join(str(message).split())
        if "persistent compilation cache entry" not in text:
            before(message, *args, **more)
            return
        kind, _, cause = text.rpartition("': ")
        if "Timeout" in cause:  # else every program would wait for it anew
            jax.config.update("jax_enable_compilation_cache", False)
            compilation_cache.reset_cache()
        else:
            with contextlib.suppress(OSError):
                tidy(folder, damaged="reading" in kind)
        if kind.split()[1] not in told:  # reading, writing
            told.add(kind.split()[1])
            _log.warning("compiled programs in %s: %s; the run goes on", folder, cause)

    warnings.showwarning = show
    warnings.filterwarnings("always", "Error (reading|writing) persistent compilation cache entry")


def _processor() -> str:
    """Names the kind of this machine's processor, by what it can do."""
    text = f"{platform.machine()} {platform.processor()}"
    if sys.platform == "linux":
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
            wanted = ("flags", "Features", "model name")
            text += "".join(sorted({line for line in file if line.startswith(wanted)}))
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _count(event: str, **_: Any) -> None:
    if event in _EVENTS:
        _counts[_EVENTS[event]] += 1


def _add_seconds(event: str, duration_secs: float, **_: Any) -> None:
    if event in _SECONDS:
        _counts[_SECONDS[event]] += duration_secs


jax.monitoring.register_event_listener(_count)
jax.monitoring.register_event_duration_secs_listener(_add_seconds)
