"""Ghost BatchNorm: each group of G new rows is normalised by itself, G fixed whatever the number of devices.

Hoffer et al. 2017, Train longer, generalize better. The B new rows of a step make S = B / G groups, and so do those of every
draw from the memory: group s has the rows from s P / S on of each part of P rows, in the order of the global batch. It is what
one of S devices would hold. So `ghost` on any number of devices is `local` on S of them, its running statistics too: they
follow the mean over the groups.

Where S is a multiple of the devices, each group lies on one of them. Elsewhere the sums of all groups are added up over the
devices, twice S numbers a channel, instead of refusing: a config then means the same on every number of devices, on more than S
as well.
"""

from functools import partial

from jax import lax

from jaxcl.check import refused
from jaxcl.models._norms._grouped import GroupedBatchNorm, Groups
from jaxcl.models._norms.base import Normalisation, RowFacts
from jaxcl.models._options import Size


class GhostNorm(GroupedBatchNorm):
    """See above.

    Attributes:
      rows: G, new rows of a group.
    """

    rows: int = 32

    def groups(self, facts: RowFacts) -> Groups:
        everywhere = facts.batch_size // self.rows
        devices = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        group = facts.place * everywhere // facts.of
        if everywhere % devices:
            return Groups(group, everywhere, across=True)
        here = everywhere // devices
        return Groups(
            group % here, here, across=False
        )  # a device's own groups follow each other, from a multiple of `here` on


def ghost(rows: Size = 32) -> Normalisation:
    def fits(batch_size: int) -> None:
        if batch_size % rows:
            raise refused("model.options.norm_options.rows", rows, f"a divisor of batch_size = {batch_size}")

    def meets(batch_size: int, devices: int) -> bool:
        return batch_size // rows % devices > 0

    return Normalisation(partial(GhostNorm, rows=rows), reads=True, fits=fits, meets=meets)
