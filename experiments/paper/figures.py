"""The six figures: of each what measures it, what draws it and what is said of it."""

from collections.abc import Callable
from typing import NamedTuple

from matplotlib.figure import Figure as Picture

from experiments.paper import accuracy, memory, phases, scaling, sweep
from experiments.paper.study import Json, Study
from experiments.studies import uniformity


class Figure(NamedTuple):
    """One figure of the paper.

    Attributes:
      title: as of a section.
      measure: runs, or reads, what is needed; plain numbers.
      picture, paragraph: of what `measure` found.
    """

    title: str
    measure: Callable[[Study], Json]
    picture: Callable[[Json], Picture]
    paragraph: Callable[[Json], str]


def draws(study: Study) -> Json:
    return uniformity.measure(study.config.copy_and_resolve_references(), study.devices)


FIGURES = {
    "accuracy": Figure("1. Accuracy after each task", accuracy.measure, accuracy.picture, accuracy.paragraph),
    "sweep": Figure(
        "2. Accuracy against the size of the memory, r and c", sweep.measure, sweep.picture, sweep.paragraph
    ),
    "scaling": Figure("3. Run time against the number of devices", scaling.measure, scaling.picture, scaling.paragraph),
    "phases": Figure("4. An iteration by phase", phases.measure, phases.picture, phases.paragraph),
    "memory": Figure("5. Memory against the budget", memory.measure, memory.picture, memory.paragraph),
    "uniformity": Figure("6. Uniformity of the draw", draws, uniformity.picture, uniformity.paragraph),
}
