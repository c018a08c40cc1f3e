"""Joint training on the data of all tasks at once, in the first task: the upper bound of class-incremental learning."""

import numpy as np

from jaxcl.data.scenarios import Scenario
from jaxcl.strategies.base import Strategy


def joint() -> Strategy:
    def rows(scenario: Scenario, task: int) -> np.ndarray:
        everything = scenario.seen(len(scenario.tasks) - 1)
        return everything if task == 0 else everything[:0]

    return Strategy(rows=rows)
