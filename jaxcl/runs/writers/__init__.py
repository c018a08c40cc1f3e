"""Where the scalars of a run go beside metrics.jsonl; one file a writer.

A file NAME.py has a function `NAME(folder, settings, step) -> Writer`:

- `folder`: of the run; a writer puts its files below it.
- `settings`: the fields of the config by their names with dots, see `flat`.
- `step`: of the checkpoint that the run is continued from: what was written of later steps is written again. None for a
  run that begins.

One from outside the package is named `module.path:NAME` in `config.writers`. Packages that a writer needs are imported within
its function, so that a config that names others runs without them.
"""

from jaxcl.runs.writers.base import WRITERS, Setting, Writer, Writers, flat

__all__ = ["WRITERS", "Setting", "Writer", "Writers", "flat"]
