"""A network that some rows enter as images and others at a layer, as activations.

Pellegrini et al. 2020, Latent replay for real-time continual learning: new rows pass through the whole network, those of the
memory join them at the layer. What lies below learns from the new rows alone, and its norms have the statistics of these.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.latent import LATENT, Latent, Rows
from jaxcl.models._norms.base import Mask, RowFacts
from jaxcl.models._parts import with_still
from jaxcl.models._split import Halves, heard, split
from jaxcl.types import PyTree

PENALTY = "penalty"


def joining(model: Any, layer: str, image_shape: tuple[int, int, int]) -> tuple[Any, Halves]:
    """The model whose `apply` reads `jaxcl.latent.Rows`, and its halves. Outputs are those of all rows, images first, and have
    "latent", the activations by which a row is remembered, without a gradient.

    Raises:
      UserError: see `split`.
    """
    halves = split(model, layer, image_shape)
    # Each half runs the whole network: norms of the other one are kept from statistics, sums over devices and penalties.
    lower = with_still(model, [name for name in _parts(model, image_shape) if name not in halves.below])
    upper = with_still(halves.upper, halves.below)

    def apply(
        params: PyTree, batch_stats: PyTree, images: Rows, *, train: bool, mask: Mask = None
    ) -> tuple[dict[str, jax.Array], PyTree]:
        found, latent = images if isinstance(images, tuple) else (images, None)
        x, penalty, below = [], [], {}
        if isinstance(found, Latent):
            latent = found
        else:
            z, outputs, updates = heard(
                lower, layer, params, batch_stats, found, train=train, mask=first_rows(mask, len(found))
            )
            x, below = [z], {name: updates[name] for name in halves.below if name in updates}
            penalty = [outputs[PENALTY]] if PENALTY in outputs else []
        if latent is not None:
            x.append(latent.x.astype(x[0].dtype if x else jnp.float32))
        every = jnp.concatenate(x)
        outputs, updates = upper.apply(params, batch_stats, every, train=train, mask=mask)
        penalty += [outputs[PENALTY]] if PENALTY in outputs else []
        more = {LATENT: lax.stop_gradient(every)} | ({PENALTY: sum(penalty)} if penalty else {})
        return outputs | more, {**updates, **below}

    return model._replace(apply=apply), halves


def first_rows(mask: Mask, count: int) -> Mask:
    """The mask of the first rows alone."""
    if not isinstance(mask, RowFacts):
        return None if mask is None else mask[:count]
    rows = {field.name: getattr(mask, field.name) for field in dataclasses.fields(mask)}
    return dataclasses.replace(mask, **{name: x[:count] for name, x in rows.items() if getattr(x, "ndim", 0)})


def _parts(model: Any, image_shape: tuple[int, int, int]) -> list[str]:
    return list(jax.eval_shape(lambda key: model.init(key, image_shape)["params"], jax.random.key(0)))
