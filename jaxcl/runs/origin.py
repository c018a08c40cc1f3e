"""Where a run comes from: the command, and the commit of the checkout that jaxcl lies in."""

import contextlib
import functools
import pathlib
import shlex
import subprocess
import sys

import jaxcl


def command() -> str:
    """As it was typed, but for the folder of the interpreter."""
    program, *rest = sys.orig_argv
    return shlex.join([pathlib.Path(program).name, *rest])


@functools.cache
def commit() -> str | None:
    """The commit, with "-dirty" behind it where files differ from it; None where jaxcl is not in a checkout of its own, as when
    it is installed."""
    folder = pathlib.Path(jaxcl.__file__).parent

    def git(*arguments: str) -> str:
        options = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(["git", "-C", str(folder), *arguments], **options).stdout.strip()  # type: ignore[call-overload]

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git("ls-files", "--error-unmatch", "__init__.py")  # an environment may lie in the checkout of something else
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return None
