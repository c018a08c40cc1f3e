"""What is seen of a run as it goes on: a bar in a terminal; elsewhere one line for each of its stages."""

import dataclasses
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from ml_collections import ConfigDict
from tqdm import tqdm

_log = logging.getLogger("jaxcl")


@dataclasses.dataclass
class Runs:
    """Counts the runs of a command, for their titles.

    Attributes:
      total: how many there are.
      begun: how many of them have begun, or were finished already.
      setting: what tells the present ones from others, beside their seed; "" for nothing.
    """

    total: int
    begun: int = 0
    setting: str = ""

    def next(self, count: int) -> str:
        """The beginning of the title of the next runs, which go side by side if there are several."""
        first, self.begun = self.begun + 1, self.begun + count
        which = f"run {first}" if count == 1 else f"runs {first} to {self.begun}"
        return ", ".join(filter(None, [f"{which} of {self.total}", self.setting])) + ", "


Shown: TypeAlias = bool | Runs  # whether progress is shown, and of which of several runs


def title(progress: Shown, what: str, configs: Sequence[ConfigDict]) -> str:
    """Of runs side by side that differ in their seed, `what` being the method: "run 3 of 14, er, seed 1"."""
    seeds = f"seed {configs[0].seed}" if len(configs) == 1 else f"{len(configs)} seeds from {configs[0].seed}"
    return f"{progress.next(len(configs)) if isinstance(progress, Runs) else ''}{what}, {seeds}"


class Bar:
    """Made by `shown`. Steps are counted in a terminal alone."""

    def __init__(self, name: str, bar: tqdm, lines: bool) -> None:
        self._name, self._bar, self._lines = name, bar, lines

    def update(self, steps: int = 1) -> None:
        """So many steps are done."""
        self._bar.update(steps)

    def grow(self, steps: int) -> None:
        """There are so many more steps than was thought."""
        self._bar.total += steps

    def begin(self, stage: str) -> None:
        """`stage` such as "task 2 of 5"."""
        self._bar.set_description(f"{self._name}, {stage}")

    def end(self, stage: str, scores: Mapping[str, str]) -> None:
        """What was found at the end of a stage; in a line the first score goes without its name."""
        self._bar.set_postfix(scores)
        if self._lines:
            first, *others = scores.items()
            _log.info("%s", ", ".join([self._name, stage, first[1], *(f"{name} {x}" for name, x in others)]))


@contextmanager
def shown(name: str, total: int, done: int, progress: bool) -> Iterator[Bar]:
    """The bar of a run of `total` steps, `done` of which are. Without `progress` nothing is shown."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    with tqdm(total=total, initial=done, desc=name, unit="step", disable=not (progress and terminal)) as bar:
        yield Bar(name, bar, progress and not terminal)
