"""Random words and keys as `jax.random` makes them, and integers made of words.

On a CPU each call of JAX's generator is a loop of five turns, started anew by every fake device, which costs more than the
words it makes. Here the rounds are written out, so that XLA fuses them with what uses the words; the bits are the same as by
JAX's defaults (tests/unit/test_threefry.py). Keys of another generator than Threefry go to `jax.random`.

`jax.random.randint` costs three calls of the generator; a draw or an insert asks for all its words at once and makes
integers of them here. They are also closer to uniform than randint's, whose arithmetic is that of 32 bits.
"""

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def words(key: jax.Array, n: int) -> jax.Array:
    """Random words, uint32 `[2, n]`: two for each integer to be made. They are `jax.random.bits(key, (2, n))`."""
    if not _is_threefry(key):
        return jax.random.bits(key, (2, n), jnp.uint32)
    a, b = _threefry(key, jnp.arange(2 * n, dtype=jnp.uint32))
    return (a ^ b).reshape(2, n)


def fold_in(key: jax.Array, number: jax.Array) -> jax.Array:
    """`jax.random.fold_in`; number int32 scalar."""
    if not _is_threefry(key):
        return jax.random.fold_in(key, number)
    return jax.random.wrap_key_data(jnp.stack(_threefry(key, jnp.uint32(number))), impl="threefry2x32")


def split(key: jax.Array, n: int) -> jax.Array:
    """`jax.random.split`: `n` keys."""
    if not _is_threefry(key):
        return jax.random.split(key, n)
    pair = _threefry(key, jnp.arange(n, dtype=jnp.uint32))
    return jax.random.wrap_key_data(jnp.stack(pair, axis=1), impl="threefry2x32")


def _is_threefry(key: jax.Array) -> bool:
    """Whether `key` is a typed key of JAX's usual generator."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and str(jax.random.key_impl(key)) == "threefry2x32"


@jax.jit  # traced and lowered once for each number of words
def _threefry(key: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011) of the 64-bit counters (0, count): two words for each."""
    first, second = jax.random.key_data(key)
    parts = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    a, b = jnp.broadcast_to(parts[0], count.shape), count + parts[1]
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            a = a + b
            b = a ^ ((b << rotation) | (b >> (32 - rotation)))
        a, b = a + parts[(i + 1) % 3], b + parts[(i + 2) % 3] + np.uint32(i + 1)
    return a, b


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
