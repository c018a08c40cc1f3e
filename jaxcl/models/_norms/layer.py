"""LayerNorm (Ba et al. 2016): each row by the mean and variance over all its positions and channels, which is GroupNorm of one
group. (The network convnext_tiny has its own, of the channels of each position.)"""

from functools import partial

from jaxcl.models._norms.base import Normalisation, never
from jaxcl.models._norms.group import GroupNorm


def layer() -> Normalisation:
    return Normalisation(partial(GroupNorm, groups=1), meets=never)
