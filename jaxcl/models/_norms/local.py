"""BatchNorm by this device's rows alone: a group is B / N rows, so that a result depends on the number of devices."""

from typing import Any

import flax.linen as nn

from jaxcl.mesh import Axis
from jaxcl.models._norms._batch import MaskedBatchNorm
from jaxcl.models._norms.base import Normalisation, never


def local() -> Normalisation:
    def layer(axis_name: Axis | None = None, **fields: Any) -> nn.Module:
        del axis_name
        return MaskedBatchNorm(**fields)

    return Normalisation(layer, meets=never)
