"""Experience replay: every batch is augmented with representatives drawn from the rehearsal buffer.

Ratcliff 1990; Rolnick et al. 2019; data-parallel with a distributed buffer: Bouvier et al. 2024. Images are stored as they
arrived (uint8, before augmentation) and augmented afresh at every replay.
"""

from jaxcl.strategies.base import Strategy

strategy = Strategy(record=lambda batch: {"image": batch["image"]})
