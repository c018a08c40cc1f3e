"""Per-row losses and scores of classification and of reconstruction.

The caller weighs the rows (invalid rows weigh nothing) and reduces.

Logits are floats `[n, K]`; everything is computed in float32 whatever their dtype. Labels are ints `[n]` in 0..K-1; others are
clipped, never an error or a NaN, so that padding may hold any label; give such rows weight 0. A class mask, bool `[K]` or
`[n, K]`, is False where a class takes no part: it restricts the rows to the classes of the task (task-incremental evaluation)
or to those seen so far; None stands for all.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxcl.types import Number

# A masked logit: its probability underflows to exactly 0, yet 0 * loss stays 0 where -inf would make it NaN.
_FAR = -1e30


def _allowed(logits: jax.Array, class_mask: jax.Array | None) -> jax.Array:
    logits = logits.astype(jnp.float32)
    return logits if class_mask is None else jnp.where(class_mask, logits, _FAR)


def _at(values: jax.Array, labels: jax.Array) -> jax.Array:
    """values[n, labels[n]] -> `[n, 1]`, labels clipped."""
    return jnp.take_along_axis(values, jnp.clip(labels, 0, values.shape[-1] - 1)[:, None], axis=-1)


def cross_entropy(logits: jax.Array, labels: jax.Array, class_mask: jax.Array | None = None) -> jax.Array:
    """Softmax cross-entropy of each row: float32 `[n]`, in nats; about 1e30 for a label that the mask forbids."""
    return -_at(jax.nn.log_softmax(_allowed(logits, class_mask)), labels)[:, 0]


def reconstruction_error(outputs: Mapping[str, jax.Array], target: Mapping[str, jax.Array]) -> jax.Array:
    """Mean absolute error of each row, summed over the target's tensors: float32 `[n]`, in the units of the tensors.

    Args:
      outputs: of the model, those of `target`'s names among them; floats `[n, ...]`.
      target: floats `[n, ...]` by name, at least one.
    """
    errors = [jnp.abs(outputs[name].astype(jnp.float32) - x).reshape(len(x), -1).mean(1) for name, x in target.items()]
    return sum(errors[1:], errors[0])


def topk_correct(logits: jax.Array, labels: jax.Array, k: int = 1, class_mask: jax.Array | None = None) -> jax.Array:
    """Whether each row's label is among its k largest logits, bool `[n]`. k is static and >= 1; k = 1 is accuracy.

    Ties count against the row (equal logits rank before the label's), and so does NaN: neither a constant nor a
    diverged model scores by accident. A label that the mask forbids is never correct; any other is once k >= K.
    """
    allowed = jnp.broadcast_to(True if class_mask is None else class_mask, logits.shape)
    scores = logits.astype(jnp.float32)
    ahead = allowed & ~(scores < _at(scores, labels))  # the label itself, and all that it does not strictly beat
    return (ahead.sum(-1) <= k) & _at(allowed, labels)[:, 0]


def distillation(
    logits: jax.Array, teacher: jax.Array, temperature: Number = 1.0, class_mask: jax.Array | None = None
) -> jax.Array:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)) of each row. Hinton et al. 2015, Distilling the knowledge.

    float32 [n], in nats; 0 where the mask allows at most one class. The factor T^2, of the `temperature`, keeps the gradient's
    scale.
    """
    log_p, log_q = (jax.nn.log_softmax(_allowed(x / temperature, class_mask)) for x in (teacher, logits))
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
