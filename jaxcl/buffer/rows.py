"""What a user gives: rows, checked against the record that the buffer was made for and completed where they say nothing.

Shapes and dtypes are checked as the functions are traced. What only the values tell is not stored and counted, see `storable`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.buffer.bits import Spec, leaf_name
from jaxcl.buffer.policy.base import INT32_MAX
from jaxcl.buffer.shard import Rows
from jaxcl.buffer.weights import usable
from jaxcl.errors import UserError
from jaxcl.types import PyTree


def check_rows(record: PyTree, rows: Rows, *, labelled: bool, weighted: bool = False, shards: int = 1) -> int:
    """How many rows these are.

    Args:
      record: one record, a pytree of `jax.ShapeDtypeStruct`.
      rows: arrays, traced or not.
      labelled: whether the policy needs labels.
      weighted: whether weights are stored.
      shards: over how many devices they are to be split.

    Raises:
      UserError: a leaf is no array `[n, ...]` of the record's shape and dtype, label or id no int32 `[n]`, valid no bool `[n]`,
        weight no float32 `[n]` or not wanted.
    """
    if not isinstance(rows, Rows):
        raise UserError(f"rows: {type(rows).__name__} is not allowed, give jaxcl.buffer.Rows")
    theirs, mine = jax.tree.structure(rows.record), jax.tree.structure(record)
    if str(theirs) != str(mine):
        raise UserError(f"rows.record: the pytree {theirs} is not allowed, give {mine}, as the buffer was made for")
    leaves = jax.tree_util.tree_leaves_with_path(rows.record)
    first = leaves[0][1]
    n = first.shape[0] if getattr(first, "ndim", 0) else -1
    for (path, leaf), spec in zip(leaves, jax.tree.leaves(record), strict=True):
        check_leaf(leaf_name("rows.record", path), leaf, spec, n)
    for name, dtype in (("label", "int32"), ("id", "int32"), ("valid", "bool"), ("weight", "float32")):
        leaf = getattr(rows, name)
        if leaf is not None:
            check_leaf(f"rows.{name}", leaf, Spec((), jnp.dtype(dtype)), n)
    if labelled and rows.label is None:
        raise UserError(f"rows.label: missing, give int32 [{n}]: the policy chooses by class")
    if rows.weight is not None and not weighted:
        raise UserError("rows.weight: not allowed, as the buffer's sampling is not weighted; leave it None")
    if n % shards:
        raise UserError(f"rows: {n} rows are not allowed, give a multiple of the number of devices, {shards}")
    return n


def check_leaf(name: str, leaf: Any, spec: Spec, n: int) -> None:
    """Raises:
    UserError: it is no array `[n, ...]` of this shape and dtype.
    """
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if n < 0 or shape != (n, *spec.shape) or dtype != spec.dtype:
        given = type(leaf).__name__ if dtype is None else f"{dtype} {list(shape or ())}"
        wanted = ", ".join(map(str, ("n" if n < 0 else n, *spec.shape)))
        raise UserError(f"{name}: {given} is not allowed, give {spec.dtype} [{wanted}], as the buffer was made for")


def complete(rows: Rows, n: int, serial: Callable[[jax.Array], jax.Array]) -> Rows:
    """`n` checked rows with label 0, the ids `serial(0 .. n - 1)` and all valid where they do not say; but for weights."""
    number = jnp.arange(n, dtype=jnp.int32)
    return dataclasses.replace(
        rows,
        label=jnp.zeros((n,), jnp.int32) if rows.label is None else jnp.asarray(rows.label),
        id=serial(number) & INT32_MAX if rows.id is None else jnp.asarray(rows.id),
        valid=jnp.ones((n,), bool) if rows.valid is None else jnp.asarray(rows.valid),
        weight=None if rows.weight is None else jnp.asarray(rows.weight),
    )


def storable(rows: Rows, classes: int | None, num_ids: int | None) -> jax.Array:
    """Whether each row can be stored, bool `[n]`: its id is in [0, num_ids), its label in [0, classes), its weight usable."""
    ok = rows.id >= 0
    if rows.weight is not None:
        ok &= usable(rows.weight)
    if num_ids is not None:
        ok &= rows.id < num_ids
    return ok if classes is None else ok & (rows.label >= 0) & (rows.label < classes)
