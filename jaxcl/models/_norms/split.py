"""BatchNorm by separate statistics of new and of replayed rows, each over all devices: the plain way to keep the many new
rows from drowning the few old ones, as pairs of domains have statistics of their own in Chang et al. 2019, Domain-specific
batch normalization for unsupervised domain adaptation. Whence a row of the test set would be is not known there, so
evaluation has one set of statistics for all, which follows the mean of both. Without replayed rows it is `sync`.
"""

from typing import ClassVar

import jax.numpy as jnp

from jaxcl.models._norms._grouped import GroupedBatchNorm, Groups
from jaxcl.models._norms.base import Normalisation, RowFacts


class SplitNorm(GroupedBatchNorm):
    counts_empty: ClassVar[bool] = False

    def groups(self, facts: RowFacts) -> Groups:
        return Groups(facts.replayed.astype(jnp.int32), 2, across=True)


def split() -> Normalisation:
    return Normalisation(SplitNorm, reads=True)
