"""A-GEM: a step must not raise the loss on a draw from memory, to first order.

Chaudhry et al. 2019, Efficient lifelong learning with A-GEM, equation 11. With g the gradient on new rows and h that on
replayed ones, both over all devices: g if g.h >= 0, else g - (g.h / h.h) h. The two passes are separate, so that batch
statistics of new and replayed rows do not mix.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxcl.strategies.base import Context, Descend, Descent, Part, Strategy
from jaxcl.types import PyTree


def agem() -> Strategy:
    def gradients(
        descend: Descend, params: PyTree, batch_stats: PyTree, parts: tuple[Part, ...], context: Context
    ) -> Descent:
        new, replay = parts
        now = descend(params, batch_stats, (new,))
        reference = descend(params, now.batch_stats, (replay,))
        return Descent(
            project(now.grads, reference.grads, context.vdot),
            now.loss,
            reference.batch_stats,
            now.parts + reference.parts,
        )

    return Strategy(draws=1, gradients=gradients, by_parts=True, weights=(1.0, 1.0))


def project(grads: PyTree, reference: PyTree, vdot: Callable[[PyTree, PyTree], jax.Array] = optax.tree.vdot) -> PyTree:
    """`grads` without its component against `reference`; unchanged where they agree or `reference` is 0.

    `vdot`: see `Context`.
    """
    dot, square = vdot(grads, reference), vdot(reference, reference)
    excess = jnp.where((dot < 0) & (square > 0), dot / jnp.where(square > 0, square, 1.0), 0.0)
    return jax.tree.map(lambda g, h: g - excess * h, grads, reference)
