"""The figures that stand in the prose of docs: each behind a mark that says where in a result file it is from.

    <!--= FILE PATH -->FIGURE

FILE is a result's name; PATH leads to a number, or to a list of one number a seed or repeat. It is names with dots between,
`[CONDITION;...]` behind the name of a list being the one record in which every NAME=VALUE holds (`NAME=` where there is no such
field); then, if need be, `median`, `min` or `max` of a list, and `x100`. The figure has as many decimals as are written there,
and is the mean and the sample deviation of a list where it is written `MEAN ± DEVIATION`:

    <!--= bench_seeds speed_up.steps.median -->1.9
    <!--= memory_modes effects[change=N times the budget].average_accuracy x100 -->18.42 ± 3.41
"""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.pages.page import ROOT, Json, load

NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?"
FIGURE = re.compile(rf"(<!--= (\S+) (.+?) -->)({NUMBER}(?: ± {NUMBER})?)?", re.DOTALL)
STEP = re.compile(r"([^.\[\]]+)(?:\[(.*?)\])?(?:\.|$)")
OF_A_LIST: dict[str, Callable[[Any], Any]] = {"median": np.median, "min": np.min, "max": np.max}


def pages() -> list[pathlib.Path]:
    """All that may have such figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def write() -> None:
    for path in pages():
        path.write_text(filled(path.read_text()))


def filled(text: str) -> str:
    """The page with every marked figure as its result file has it.

    Raises:
      ValueError: a mark leads to no number, or no figure stands behind it.
    """
    return FIGURE.sub(_figure, text)


def _figure(found: re.Match[str]) -> str:
    mark, file, where, written = found.groups()
    try:
        if written is None:
            raise ValueError("no figure stands behind it")
        return mark + like(written, value(_load(file), " ".join(where.split())))
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{mark}: {error}") from error


@functools.cache
def _load(file: str) -> Json:
    return load(file)


def value(found: Any, where: str) -> np.ndarray:
    """What `where`, a path with what is to be done with it, leads to in a result.

    Raises:
      KeyError, ValueError: to nothing, or to several records.
    """
    path, *rest = re.split(r" (?=(?:median|min|max|x\d+)\b)", where)
    for name, conditions in STEP.findall(path):
        found = found[name]
        if conditions:
            found = _record(found, dict(x.split("=", 1) for x in conditions.split(";")))
    numbers = np.asarray(found, float)
    for what in rest:
        numbers = OF_A_LIST[what](numbers) if what in OF_A_LIST else numbers * float(what[1:])
    return numbers


def _record(records: list[Json], wanted: dict[str, str]) -> Json:
    found = [one for one in records if all(str(one.get(name, "")) == x for name, x in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} records have {wanted}")
    return found[0]


def like(written: str, numbers: np.ndarray) -> str:
    """The numbers as a figure is written: with as many decimals, alone or as mean and deviation.

    Raises:
      ValueError: several numbers where one is written, or one where mean and deviation are.
    """
    decimals = [len(part.partition(".")[2]) for part in written.split(" ± ")]
    shown = [numbers] if len(decimals) == 1 else [numbers.mean(), numbers.std(ddof=1)] if numbers.size > 1 else []
    if len(shown) != len(decimals) or np.ndim(shown[0]):
        raise ValueError(f"{numbers.size} numbers do not make {written}")
    return " ± ".join(f"{x:,.{n}f}" for x, n in zip(shown, decimals, strict=True))


if __name__ == "__main__":
    write()
