"""jaxcl: data-parallel continual learning in JAX with a distributed rehearsal buffer.

from jaxcl import Rows, make_buffer          # the buffer alone, for your own loop
from jaxcl import train_and_evaluate         # a whole run from a config
from jaxcl import load                       # what it has trained
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxcl.buffer import Rows, make_buffer
    from jaxcl.mesh import make_mesh
    from jaxcl.training.config import default_config
    from jaxcl.training.loop import train_and_evaluate
    from jaxcl.training.trained import load

__version__ = "0.3.0"
INSTALL = "pip install 'jaxcl[train]'"  # what brings all that training needs
__all__ = ["Rows", "default_config", "load", "make_buffer", "make_mesh", "train_and_evaluate"]

_ROOMS = {
    "Rows": "jaxcl.buffer",
    "make_buffer": "jaxcl.buffer",
    "make_mesh": "jaxcl.mesh",
    "default_config": "jaxcl.training.config",
    "load": "jaxcl.training.trained",
    "train_and_evaluate": "jaxcl.training.loop",
}


def __getattr__(name: str) -> Any:
    """The names above, imported when they are first asked for: the buffer does not need what training does."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'jaxcl' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_ROOMS[name]), name)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("jaxcl"):
            raise
        raise ModuleNotFoundError(f"jaxcl.{name} needs {error.name}: {INSTALL}", name=error.name) from error
