"""AdaB2N: a batch norm that balances the tasks in the statistics of a batch, and adapts the momentum of the running ones.

Lyu et al., NeurIPS 2023, Overcoming recency bias of normalization statistics in continual learning. A batch has n_t rows of
task t, out of 0..now. Each layer learns phi `[T]`, from 0, and weighs the tasks by

    w_t = (exp(phi_t) + n_t) / sum over s of (exp(phi_s) + n_s)

mean = sum of w_t / n_t over the rows' means, var likewise of (x - mean)^2; a task without a row in the batch takes its weight
away from the sums, as in the authors' code. With m, the weight of the batch in an update of a plain norm, the running
statistics follow by eta in its place: m^kappa at first, then eta <- eta / (eta + (1 - m)^kappa), which is m at kappa = 1 and
the mean over all batches at kappa = 0. The loss grows by

    strength * sum over layers of (mean over channels of (mean - running mean)^2, and of (var - running var)^2)

against the running statistics just updated, without a gradient through them, from task `first_task` on. All sums are over the
rows of all devices, in one collective.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.models._norms.base import PENALTIES, Mask, Normalisation, NormLayer, facts_of, moments_of_groups
from jaxcl.models._options import Amount, Share, Whole


class AdaB2N(NormLayer):
    """Params `scale`, `bias` `[C]` and `phi` `[T]`; batch_stats `mean`, `var` `[C]` and `eta` [], 0 before the first batch.

    Attributes:
      tasks: T.
      kappa, strength, first_task: see above.
    """

    tasks: int = 1
    kappa: float = 1.0
    strength: float = 0.0
    first_task: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: Mask = None) -> jax.Array:
        """x `[n, ..., C]` -> the same shape; in training `mask` is `RowFacts`."""
        channels = x.shape[-1]
        affine, running = self.affine(channels), self.running(channels)
        phi = self.param("phi", nn.initializers.zeros, (self.tasks,), jnp.float32)
        eta = self.variable("batch_stats", "eta", jnp.zeros, (), jnp.float32)
        x = x.astype(jnp.float32)
        if not train:
            return self.normalised(x, running[0].value, running[1].value, affine)
        facts = facts_of(mask)
        rows, means, squares = moments_of_groups(x, mask, facts.task, self.tasks, self.axis_name)
        there = jnp.sum(rows) > 0
        taken = (jnp.arange(self.tasks) <= facts.now) | (rows > 0)
        share = jnp.where(taken, jnp.exp(phi) + rows, 0.0)
        share = jnp.where(rows > 0, share / jnp.sum(share), 0.0)
        mean = share @ means
        # The sum of w (x - mean)^2, where the weights w may sum to less than 1.
        var = jnp.maximum(share @ squares - (2 - jnp.sum(share)) * jnp.square(mean), 0)
        batch = [jnp.where(there, new, old.value) for new, old in zip((mean, var), running, strict=True)]
        first, m = eta.value == 0, 1 - self.momentum
        follow = jnp.where(first, m**self.kappa, eta.value / (eta.value + (1 - m) ** self.kappa))
        eta.value = jnp.where(there, follow, eta.value)
        for old, new in zip(running, batch, strict=True):
            old.value += follow * (lax.stop_gradient(new) - old.value)
        apart = sum(jnp.mean(jnp.square(new - old.value)) for old, new in zip(running, batch, strict=True))
        if self.strength:
            self.sow(PENALTIES, "moments", jnp.where(facts.now >= self.first_task, self.strength * apart, 0.0))
        return self.normalised(x, batch[0], batch[1], affine)


def ada(tasks: int, kappa: Share = 1.0, strength: Amount = 0.0, first_task: Whole = 1) -> Normalisation:
    layer = partial(AdaB2N, tasks=tasks, kappa=kappa, strength=strength, first_task=first_task)
    return Normalisation(layer, reads=True)
