"""UnMix-TNS: a norm for streams whose rows come sorted. K components of running statistics; each row is normalised by a
mixture of its own moments with theirs.

Tomar et al., ICLR 2024, Un-mixing test-time normalization statistics: combatting label temporal correlation. With a row's
moments mu, v over its positions and p_k = softmax over k of cos(mu, mu_k) / 0.07, without a gradient,

    mu_k' = (1 - p_k) mu_k + p_k mu,  v_k' = (1 - p_k) v_k + p_k v
    mean = mean over k of mu_k',  var = mean of v_k' + mean of mu_k'^2 - mean^2
    mu_k <- mu_k + (1 - m) * mean over the rows of p_k (mu - mu_k), and v_k likewise

The paper begins from a trained network and adapts it to test rows that arrive in order. Here the network is trained by it,
with the rows of all devices in the update, and evaluation leaves the components as they are: a row's prediction does not
depend on those before it. The components begin about mean 0 and variance 1 as the paper's about a network's own: mean of
variance 0.5 K / (K - 1) among them, variance 0.5 in each. Rows meet in the update alone.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.models._norms.base import Mask, Normalisation, NormLayer, row_moments, valid_of, variance
from jaxcl.models._options import Size

SHARPNESS = 0.07  # of the softmax
APART = 0.5  # of the variance at first, what lies between the components


class UnMix(NormLayer):
    """See above; params `scale` and `bias` `[C]`, batch_stats `means` and `vars`, `[K, C]`.

    Attributes:
      components: K.
    """

    components: int = 16

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: Mask = None) -> jax.Array:
        """x `[n, ..., C]` -> the same shape."""
        k, channels = self.components, x.shape[-1]
        spread, within = (APART * k / (k - 1), 1 - APART) if k > 1 else (0.0, 1.0)

        def draw() -> jax.Array:
            return spread**0.5 * jax.random.normal(self.make_rng("params"), (k, channels))

        means = self.variable("batch_stats", "means", draw)
        variances = self.variable("batch_stats", "vars", jnp.full, (k, channels), within, jnp.float32)
        x = x.astype(jnp.float32)
        mean, squares = row_moments(x)
        var = variance(mean, squares)
        likeness = lax.stop_gradient(_unit(mean) @ _unit(means.value).T)
        p = jax.nn.softmax(likeness / SHARPNESS)[..., None]  # [n, K, 1]
        # [n, K, C] arrays are small beside x, which has positions too.
        mixed = means.value + p * (mean[:, None] - means.value)
        mixed_var = variances.value + p * (var[:, None] - variances.value)
        out = self.normalised(x, mixed.mean(1), mixed_var.mean(1) + mixed.var(1), self.affine(channels))
        if train:
            valid = jnp.ones(len(x)) if mask is None else valid_of(mask).astype(jnp.float32)
            weights = p * valid[:, None, None]
            sums = [jnp.sum(weights * (own[:, None] - old.value), 0) for own, old in ((mean, means), (var, variances))]
            count = jnp.sum(valid)
            if self.axis_name is not None:
                sums, count = lax.psum((sums, count), self.axis_name)
            for old, step in zip((means, variances), sums, strict=True):
                old.value += (1 - self.momentum) * lax.stop_gradient(step) / jnp.maximum(count, 1)
        return out


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def unmix(components: Size = 16) -> Normalisation:
    return Normalisation(partial(UnMix, components=components))
