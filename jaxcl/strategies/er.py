"""Experience replay: every batch is augmented with representatives drawn from the rehearsal buffer.

Ratcliff 1990; Rolnick et al. 2019; data-parallel with a distributed buffer: Bouvier et al. 2024. The loss is the mean
over all rows, new and replayed. Images are stored as they arrived (uint8) and augmented afresh at every replay.
"""

from jaxcl.strategies.base import Strategy


def er() -> Strategy:
    return Strategy(draws=1, alike=True)
