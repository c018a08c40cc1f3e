"""The interface of a policy, and what several share.

A policy is written for one device's share. The shares of N devices together hold exactly `capacity` rows: the union's
row numbers 0..capacity-1 are dealt round-robin, number g to shard g mod N, so shares differ by at most one row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from jaxcl.buffer.sort import stable_order
from jaxcl.check import Rule, check
from jaxcl.types import PyTree

INT32_MAX = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every policy is made from.

    Attributes:
      capacity: rows in the union, at least one a shard.
      shards: N.
      num_classes: K, a static bound on the labels; None where it is not known.
      accept: the paper's c/b; None where it is not known.
    """

    capacity: int
    shards: int
    num_classes: int | None = None
    accept: float | None = None

    @property
    def slots(self) -> int:
        """Rows that every shard has memory for."""
        return -(-self.capacity // self.shards)

    @property
    def classes(self) -> int:
        """K of a policy that has called `check_classes`."""
        assert self.num_classes is not None
        return self.num_classes

    def room(self, shard: Any) -> Any:
        """Rows that `shard`, an int32 scalar or array, may hold."""
        return share(shard, self.capacity, self.shards)

    def rooms(self) -> np.ndarray:
        """Rows that each shard may hold, int64 `[N]`."""
        return dealt(self.capacity, self.shards)


class Moves(NamedTuple):
    """Which stored rows go where when the shards become another number.

    Attributes:
      take: int64 `[n]`, the old slot of every stored row, counted over all old shards.
      shard, slot: int64 `[n]`, the new shard of each and its slot there.
      meta: the policy's metadata of the new shards, leaves `[N, ...]`.
    """

    take: np.ndarray
    shard: np.ndarray
    slot: np.ndarray
    meta: dict[str, np.ndarray]


class Policy(NamedTuple):
    """A policy bound to its budget. Of what its functions take, `shard` is the number of a shard, int32 scalar, `meta` its
    metadata, leaves `[1, ...]`, `label` int32 `[n]` and `valid` bool `[n]`.

    Attributes:
      init: `(shard) -> meta`, of an empty shard.
      choose: `(meta, key, shard, label, valid) -> (slot, meta)`, the slots of a batch of rows as a loop over them in their
        order would choose them, int32 `[n]`: a value >= `slots` stores nothing, of equal ones the last row is meant to win.
        `key` is for this shard and this insert alone; rows that are not valid take no slot and change nothing.
      locate: `(meta, shard, rank) -> slot`: where the stored rows number `rank` (int32 `[n]`, 0..size-1) lie.
      size: `(meta, shard) -> int32 scalar`, rows stored in this shard.
      slots: rows a shard has memory for.
      classes: K if labels have to lie in [0, K): of other rows none is offered as valid. None if labels are not read.
      class_sizes: `(meta) -> int32 [K]`, rows of each class in this shard, for policies whose ranks run class by class; else
        None.
      without: `(meta, gone, kept) -> (slot, meta)`: the memory without the classes `gone`, bool `[K]`, whose places are free;
        `kept`, bool `[slots]`, are the slots whose labels are of other classes. The row of each new slot comes from `slot`,
        int32 `[slots]`, from nowhere where that is out of range. None: it cannot give up a class.
      move: `(meta, label, old) -> Moves` from `old` shards to those of the budget, in NumPy on the host; `meta` and `label`
        are those of all old shards. None: its memory cannot move.
    """

    init: Callable[[jax.Array], PyTree]
    choose: Callable[[PyTree, jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, PyTree]]
    locate: Callable[[PyTree, jax.Array, jax.Array], jax.Array]
    size: Callable[[PyTree, jax.Array], jax.Array]
    slots: int
    classes: int | None = None
    class_sizes: Callable[[PyTree], jax.Array] | None = None
    without: Callable[[PyTree, jax.Array, jax.Array], tuple[jax.Array, PyTree]] | None = None
    move: Callable[[Any, np.ndarray, int], Moves] | None = None


def bind(
    budget: Budget,
    *,
    classes: int | None = None,
    class_sizes: Callable[[PyTree], jax.Array] | None = None,
    **functions: Callable,
) -> Policy:
    """The policy of these functions by their names in `Policy`; all but `class_sizes` take the budget first."""
    bound: dict[str, Any] = {name: functools.partial(function, budget) for name, function in functions.items()}
    return Policy(slots=budget.slots, classes=classes, class_sizes=class_sizes, **bound)


def check_classes(budget: Budget, policy: str) -> None:
    """Raises:
    UserError: the policy needs `num_classes`.
    """
    rule = Rule(lambda x: x is not None and x >= 1, f"a positive number: the policy {policy} needs it")
    check("buffer.num_classes", budget.num_classes, rule)


def share(shard: Any, capacity: Any, shards: int) -> Any:
    """How many of the row numbers 0..capacity-1 are dealt to `shard`: those congruent to it modulo `shards`."""
    return (capacity - shard + shards - 1) // shards


def arrivals(label: jax.Array, valid: jax.Array, classes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The order of a batch by classes.

    Args:
      label: int32 `[n]`, in [0, classes) where valid.
      valid: bool `[n]`.

    Returns:
      order: int32 `[n]`, the positions of the valid rows class by class, each class in its order; behind them the others.
      ahead: int32 `[n]`, for each valid row how many valid ones before it have its label.
      came: int32 `[classes]`, valid rows of each class.
    """
    label = jnp.where(valid, label, classes)
    came = jnp.zeros((classes + 1,), jnp.int32).at[label].add(1)
    order = stable_order(label, classes + 1)
    ahead = jnp.arange(label.shape[0], dtype=jnp.int32) - (jnp.cumsum(came, dtype=jnp.int32) - came)[label[order]]
    return order, jnp.zeros_like(label).at[order].set(ahead, unique_indices=True), came[:classes]


def compacted(chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The positions of the true entries of `chosen`, bool `[n]`, int32 `[n]` with n behind them; and their number, int32."""
    n = chosen.shape[0]
    until = jnp.cumsum(chosen, dtype=jnp.int32)
    place = jnp.where(chosen, until - 1, n)
    position = jnp.arange(n, dtype=jnp.int32)
    return jnp.full((n,), n, jnp.int32).at[place].set(position, mode="drop"), jnp.sum(chosen, dtype=jnp.int32)


@custom_vmap
def trips(count: jax.Array) -> jax.Array:
    """The steps of a loop that needs `count`, int32 scalar; under vmap the most that any needs, so that all stop together.

    Loops that stop apart would be made one by selecting between old and new state, all of it, at every step. Steps beyond a
    loop's own count must change nothing.
    """
    return count


@trips.def_vmap
def _trips_of_all(size: int, batched: Any, count: jax.Array) -> tuple[jax.Array, bool]:
    return trips(jnp.max(count)), False


def turns(budget: Budget, shard: jax.Array) -> jax.Array:
    """When each class gets its next row on this shard, int32 `[K]`, in [0, N).

    With fewer rows than classes, or a number that does not divide, a shard cannot treat all classes alike. For the union to
    be fair, row j of class c has the height j N + turn, and a full shard keeps the rows of least height. The turn of a class
    is 0 on one shard, 1 on the next and so on, so that in the union it has exactly one row of each height. It begins at
    the shard that is c mod N with its bits reversed: few classes begin far apart. With one shard heights are numbers of rows.
    """
    width = (budget.shards - 1).bit_length()
    reverse = [int(f"{s:0{width}b}"[::-1], 2) for s in range(budget.shards)]
    begin = np.argsort(np.argsort(reverse)).astype(np.int32)
    return (shard - begin[np.arange(budget.classes) % budget.shards]) % budget.shards


def rank_is_slot(budget: Budget, meta: PyTree, shard: jax.Array, rank: jax.Array) -> jax.Array:
    """`locate` of a policy whose stored rows lie in the first slots."""
    return rank


# For moves.


def dealt(rows: int, shards: int) -> np.ndarray:
    """How many of `rows` rows each shard gets, dealt round-robin; int64 `[shards]`."""
    return share(np.arange(shards), rows, shards)


def merge(lists: list[np.ndarray], *, align_ends: bool = False) -> np.ndarray:
    """One list of several, place by place: all first entries, all second ones, ... or, with `align_ends`, all last ones
    last."""
    place = np.concatenate([np.arange(len(x)) - (len(x) if align_ends else 0) for x in lists])
    return np.concatenate(lists)[np.argsort(place, kind="stable")]


def deal_by_class(
    budget: Budget, take: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Deals rows round-robin class after class, so that classes and shards are balanced to within one row.

    Args:
      budget: of the new shards.
      take: int64 `[n]`, old slots.
      label: int32, of every old slot.

    Returns:
      take sorted by class, the shard and the slot of each row, and rows of each class on each shard, `[N, K]`.
    """
    take = take[np.argsort(label[take], kind="stable")]
    row = np.arange(len(take))
    shard = row % budget.shards
    stored = np.zeros((budget.shards, budget.classes), np.int64)
    np.add.at(stored, (shard, label[take]), 1)
    return take, shard, row // budget.shards, stored


def int32(**meta: np.ndarray) -> dict[str, np.ndarray]:
    """Metadata in the type in which it is kept."""
    return {name: x.astype(np.int32) for name, x in meta.items()}
