"""Random integers from random words, so that one call of the generator serves a whole plan.

`jax.random.randint` costs three calls of the generator, and on a CPU each is a loop of its own; a draw or an insert asks for
all its words at once and makes integers of them here. They are also closer to uniform than randint's, whose arithmetic is
that of 32 bits.
"""

import jax
import jax.numpy as jnp


def words(key: jax.Array, n: int) -> jax.Array:
    """Random words, uint32 `[2, n]`: two for each integer to be made."""
    return jax.random.bits(key, (2, n), jnp.uint32)


def below(words: jax.Array, span: jax.Array) -> jax.Array:
    """Integers uniform in [0, span), int32 `[...]`, of words uint32 `[2, ...]`; span int32, broadcastable, at least 1.

    floor(w * span / 2**64) for the 64-bit number w (Lemire 2019): the probabilities of two integers differ by less than
    2**-64 and so, relative to one of them, by less than 2**-33.
    """
    span = span.astype(jnp.uint32) if isinstance(span, jax.Array) else jnp.uint32(span)
    high, low = words[0], words[1]
    carried = _high_word(low, span)
    overflow = high * span + carried < carried
    return (_high_word(high, span) + overflow).astype(jnp.int32)


def unit(words: jax.Array) -> jax.Array:
    """Numbers uniform in [0, 1) in steps of 2**-24, float32, of words uint32 of the same shape."""
    return (words >> 8).astype(jnp.float32) * 2.0**-24


def _high_word(a: jax.Array, b: jax.Array) -> jax.Array:
    """The upper 32 bits of the 64-bit product of two uint32."""
    a_low, a_high, b_low, b_high = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    other = a_low * b_high + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (other >> 16)
