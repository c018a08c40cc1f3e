"""Where a figure was measured: what every result file says beside its numbers."""

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from typing import Any

import jax


def environment(packages: tuple[str, ...] = ("jax", "jaxlib", "flax", "optax", "numpy")) -> dict[str, Any]:
    """Versions, devices and machine of this process, and the command that started it."""
    device = jax.devices()[0]
    return {
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "devices": {"count": jax.device_count(), "kind": device.device_kind, "platform": device.platform},
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
        "command": " ".join(["python -m", *_module(), *(shlex.quote(_without_place(x)) for x in sys.argv[1:])]),
    }


def _without_place(argument: str) -> str:
    """`--workdir=/somewhere/x` -> `--workdir=WORKDIR`: where files lay says nothing about the figures."""
    return re.sub(
        r"^--(?:\w+\.)*(\w+)=(\w+:)?[/~].*", lambda m: f"{m[0].partition('=')[0]}={m[2] or ''}{m[1].upper()}", argument
    )


def _module() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name.removesuffix(".__main__") if spec else sys.argv[0]]
