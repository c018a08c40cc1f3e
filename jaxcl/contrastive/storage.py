"""How a bank keeps an embedding: as it is, in half the bytes, or in a quarter of them with a scale of its own a row."""

import jax
import jax.numpy as jnp
from jax import lax

STORAGES = ("float32", "bfloat16", "int8")
Stored = dict[str, jax.Array]
# As bits: XLA's CPU compiler makes a bfloat16 scatter a float32 one, and so a float32 copy of the whole bank every step.
_KEPT = {"bfloat16": "uint16"}


def spec(storage: str, dim: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of one stored embedding of `dim` numbers."""
    found = {"value": jax.ShapeDtypeStruct((dim,), jnp.dtype(_KEPT.get(storage, storage)))}
    return found | ({"scale": jax.ShapeDtypeStruct((), jnp.dtype("float32"))} if storage == "int8" else {})


def encode(storage: str, x: jax.Array) -> Stored:
    """Embeddings float32 `[n, D]` as they are stored. int8: x = scale * value, scale = max |x| / 127 of the row, rounded to
    the nearest, so that no number is off by more than scale / 2."""
    if storage == "float32":
        return {"value": x}
    if storage == "bfloat16":
        return {"value": lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)}
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-30) / 127
    return {"value": jnp.round(x / scale[:, None]).astype(jnp.int8), "scale": scale}


def decode(stored: Stored) -> jax.Array:
    """What was stored, float32 `[n, D]`."""
    value = stored["value"]
    if value.dtype == jnp.uint16:
        value = lax.bitcast_convert_type(value, jnp.bfloat16)
    value = value.astype(jnp.float32)
    return value * stored["scale"][:, None] if "scale" in stored else value
