"""How leaves of a record are stored: types that XLA handles as whole arrays of another type are kept by their bits.

XLA for CPUs widens a bfloat16 or 8-bit float array to write a few rows of it, which copies the whole shard at every insert and
changes signalling NaNs; it packs 4-bit integers anew; complex numbers and keys have no bytes that a collective could carry.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.errors import UserError
from jaxcl.types import PyTree

Spec = jax.ShapeDtypeStruct


def spec_of(record: PyTree) -> PyTree:
    """Shapes and dtypes of one record, a pytree of arrays or `jax.ShapeDtypeStruct`.

    Raises:
      UserError: a leaf is no array, or of a type that cannot be stored.
    """
    if not jax.tree.leaves(record):
        raise UserError("record: holds no array, give one record as a pytree of arrays")
    return jax.tree_util.tree_map_with_path(_spec_of_leaf, record)


def _spec_of_leaf(path: jax.tree_util.KeyPath, leaf: object) -> Spec:
    name = leaf_name("record", path)
    if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
        raise UserError(f"{name}: {leaf!r} is not allowed, give an array or a jax.ShapeDtypeStruct")
    spec = Spec(tuple(leaf.shape), leaf.dtype)
    if not is_key(spec) and jax.dtypes.canonicalize_dtype(spec.dtype) != spec.dtype:
        narrow = jax.dtypes.canonicalize_dtype(spec.dtype)
        raise UserError(f"{name}: {spec.dtype} is not allowed, give {narrow} or set jax_enable_x64")
    try:
        stored_as(spec)
    except TypeError:
        raise UserError(f"{name}: {spec.dtype} is not allowed, give numbers, booleans or keys") from None
    return spec


def leaf_name(field: str, path: jax.tree_util.KeyPath) -> str:
    """A leaf in words: the field and its place in the pytree, with dots."""
    place = jax.tree_util.keystr(path, simple=True, separator=".")
    return f"{field}.{place}" if place else field


def is_key(x: Spec | jax.Array) -> bool:
    """Whether it holds keys of `jax.random`."""
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def stored_as(spec: Spec) -> Spec:
    """Shape and dtype in which a leaf of this shape and dtype is stored.

    Raises:
      TypeError: it cannot be.
    """
    if is_key(spec):
        data = jax.eval_shape(jax.random.key_data, Spec(spec.shape, spec.dtype))
        return Spec(data.shape, data.dtype)
    dtype = np.dtype(spec.dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return Spec((*spec.shape, 2), np.dtype(f"float{4 * dtype.itemsize}"))
    if jnp.issubdtype(dtype, jnp.floating):
        bits = jnp.finfo(dtype).bits
        if bits < 8:
            raise TypeError
        return spec if bits >= 32 else Spec(spec.shape, np.dtype(f"uint{bits}"))
    if jnp.issubdtype(dtype, jnp.integer):
        return spec if jnp.iinfo(dtype).bits >= 8 else Spec(spec.shape, np.dtype(np.int8))
    if dtype == np.bool_:
        return spec
    raise TypeError


def to_bits(leaf: jax.Array) -> jax.Array:
    """A leaf `[n, ...]` as it is stored."""
    to = stored_as(Spec(leaf.shape, leaf.dtype))
    if is_key(leaf):
        return jax.random.key_data(leaf)
    leaf = jnp.asarray(leaf)
    if to.dtype == leaf.dtype:
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return jnp.stack([leaf.real, leaf.imag], axis=-1)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf.astype(to.dtype)
    return lax.bitcast_convert_type(leaf, to.dtype)


def from_bits(spec: Spec, stored: jax.Array) -> jax.Array:
    """A stored leaf `[n, ...]` in the dtype of `spec`, one record's."""
    if is_key(spec):
        return jax.random.wrap_key_data(stored, impl=_key_impl(spec))
    if stored.dtype == spec.dtype:
        return stored
    if jnp.issubdtype(spec.dtype, jnp.complexfloating):
        return lax.complex(stored[..., 0], stored[..., 1])
    if jnp.issubdtype(spec.dtype, jnp.integer):
        return stored.astype(spec.dtype)
    return lax.bitcast_convert_type(stored, spec.dtype)


def _key_impl(spec: Spec) -> str:
    """The generator of keys of this dtype; JAX tells it of arrays alone, traced ones included."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), spec)
    return str(found[0])
