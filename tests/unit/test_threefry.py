"""The generator written out gives the bits of `jax.random`, and its integers are uniform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.buffer import threefry as random


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_words_and_keys_are_those_of_jax(impl, seed):
    key = jax.random.fold_in(jax.random.key(seed, impl=impl), 3)  # both halves of the key in use
    np.testing.assert_array_equal(random.words(key, 113), jax.random.bits(key, (2, 113), jnp.uint32))
    for number in (0, 7, 2**31 - 1):
        _same(random.fold_in(key, jnp.int32(number)), jax.random.fold_in(key, number))
    _same(random.split(key, 5), jax.random.split(key, 5))


def test_raw_keys_and_jit_and_vmap():
    raw = jax.random.PRNGKey(5)
    np.testing.assert_array_equal(random.words(raw, 9), jax.random.bits(raw, (2, 9), jnp.uint32))
    keys = jax.random.split(jax.random.key(5), 4)
    made = jax.jit(jax.vmap(lambda key: random.words(key, 9)))(keys)
    np.testing.assert_array_equal(made, jax.vmap(lambda key: jax.random.bits(key, (2, 9), jnp.uint32))(keys))


def test_no_loop_is_left_in_the_program():
    """The reason to write it out: JAX's own is a `while` on the CPU."""
    program = jax.jit(lambda key: random.words(random.split(random.fold_in(key, 1), 3)[2], 50)).lower(jax.random.key(0))
    assert " while(" not in program.compile().as_text()


def _same(one: jax.Array, other: jax.Array) -> None:
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(jax.random.key_data(one), jax.random.key_data(other))
