"""The classifier's prior: how many rows of each class a step is expected to train on.

Most rows of a rehearsal step belong to the present task, and a network trained by plain cross-entropy learns that. With
`config.loss.prior = "balanced"` it learns by the cross-entropy of logits + log n_k, where n_k are the expected rows of class k
in the step. The logits themselves, by which it is evaluated, are then those of classes that are equally likely. Ren et al.
2020, Balanced meta-softmax for long-tailed visual recognition; Menon et al. 2021, Long-tail learning via logit adjustment. In
rehearsal n_k is known:

    n_k = (valid new rows) * (share of class k among the task's rows so far)
        + weight * (valid drawn rows) * (share of class k that a draw is expected to have, see `jaxcl.buffer`)

and of a loss that adds up means over new and drawn rows, the sum of their weights times these shares. All counts are over all
devices, so n_k is the same on any number of them. A pass over some parts alone (A-GEM) has their rows as its n_k.

A class of which no row is expected, above all one that has not come yet, counts as the rarest of the others. With n_k = 0 it
would take no part in the softmax, so that nothing ever lowered its logit, and test rows would be called classes that nobody has
seen.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.mesh import AXIS, sum_counts
from jaxcl.strategies import Part
from jaxcl.types import Batch

PRIORS = ("none", "balanced")


def arrived_with(arrived: jax.Array, task_step: jax.Array, batch: Batch) -> jax.Array:
    """Valid new rows of each class that the task has had, int32 `[K]`, this batch included."""
    here = jnp.zeros_like(arrived).at[batch["label"]].add(batch["valid"].astype(arrived.dtype), mode="drop")
    rows = lax.axis_size(AXIS) * len(batch["valid"])
    return jnp.where(task_step == 0, 0, arrived) + sum_counts(AXIS, here, rows)


def with_shares(parts: Sequence[Part], arrived: jax.Array | None, drawn: jax.Array | None) -> list[Part]:
    """The new rows' part, then those of the draws, with the shares of the classes in each.

    Args:
      arrived: rows of each class that came so far, `[K]`.
      drawn: rows of each class that a draw is expected to hold, `[K]`; None without draws.
    """
    rows = [arrived, *[drawn] * (len(parts) - 1)]
    return [dataclasses.replace(part, share=_share(x)) for part, x in zip(parts, rows, strict=True)]


def _share(rows: jax.Array | None) -> jax.Array:
    assert rows is not None
    return rows.astype(jnp.float32) / jnp.maximum(jnp.sum(rows), 1)


def with_priors(parts: Sequence[Part], *, pooled: bool) -> tuple[Part, ...]:
    """The parts of one pass with its prior, where they have shares.

    Args:
      pooled: whether the loss is a mean over all rows; else it adds up means over the parts.
    """
    if any(part.share is None for part in parts):
        return tuple(parts)
    valid = lax.psum([jnp.sum(part.valid, dtype=jnp.float32) for part in parts], AXIS)
    rows = valid if pooled else [jnp.where(n > 0, 1.0, 0.0) for n in valid]
    expected = sum(part.weight * n * part.share for part, n in zip(parts, rows, strict=True))
    log_prior = jnp.log(with_rarest(expected))
    return tuple(dataclasses.replace(part, log_prior=log_prior) for part in parts)


def with_rarest(expected: jax.Array) -> jax.Array:
    """`expected` rows `[K]`, with the least positive of them in place of zeros; 1 where there is none."""
    some = expected > 0
    rarest = jnp.min(jnp.where(some, expected, jnp.inf))
    return jnp.where(some, expected, jnp.where(jnp.isinf(rarest), 1.0, rarest))
