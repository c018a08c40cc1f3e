"""Every device receives a uniform sample of the union, which statistics and losses of a device need.

Position p of the plan goes to device (p + offset) mod N: neighbours in the plan, which lie on one shard, go to different
devices, so that a pair exchanges few rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.buffer.draw import Plan
from jaxcl.buffer.exchange.base import Route, dealt_to, six_sigma, smaller, source_of
from jaxcl.mesh import Axis


def mix(per_device: int, shards: int, axis: Axis) -> tuple[Route, ...]:
    """The compact route, if it is smaller, and the one that always fits."""
    both = compact_hops(per_device, shards), Hops(shards, shards, per_device, per_device)
    return smaller(*(mix_route(hops, per_device, axis) for hops in both))


@dataclasses.dataclass(frozen=True)
class Hops:
    """The two hops of a row: first among `across` devices, `near` rows a pair, then among N / across, `far` rows a pair.

    With device number d = a + across * b, the first hop brings a row to the right a, the second to the right b. One hop is
    the case across = N, in which the second is left out.
    """

    shards: int
    across: int
    near: int
    far: int

    @property
    def along(self) -> int:
        return self.shards // self.across

    @property
    def rows_moved(self) -> int:
        return self.across * self.near + (self.along * self.far if self.along > 1 else 0)

    @property
    def rows(self) -> list[list[int]]:
        """The devices of each b, among which the first hop goes."""
        return [[a + self.across * b for a in range(self.across)] for b in range(self.along)]

    @property
    def columns(self) -> list[list[int]]:
        """The devices of each a, among which the second hop goes."""
        return [list(column) for column in zip(*self.rows, strict=True)]


@functools.cache
def compact_hops(per_device: int, shards: int) -> Hops:
    """The cheapest static sizes for shards of equal size, by the six-sigma rule.

    A shard supplies a hypergeometric number of rows of mean r, a group of `across` neighbouring shards one of mean
    across * r. A pair of one hop cannot carry less than one row, so with N far above r one hop moves N rows for r needed;
    two hops move about 2 sqrt(N). A second collective is worth it when it at least halves what is moved.
    """

    def sizes(across: int) -> Hops:
        near = min(six_sigma(per_device, across), shards * per_device // across)
        far = min(six_sigma(across * per_device, shards), per_device)
        return Hops(shards, across, near, far)

    one = dataclasses.replace(sizes(shards), near=min(six_sigma(per_device, shards), per_device))
    two = min((sizes(a) for a in range(2, shards) if shards % a == 0), key=lambda h: h.rows_moved, default=one)
    return two if 2 * two.rows_moved <= one.rows_moved else one


def mix_route(hops: Hops, per_device: int, axis: Axis) -> Route:
    """Position p goes to device (p + offset) mod N; see the module's text.

    A device sends its positions first[me]..first[me+1]-1. Those bound for the same a are `across` apart, so the k-th of them
    is the nearest one congruent to it plus k * across. At the second hop, device (a, b) holds those of its group's positions
    that are bound for a; the ones bound for device d are N apart. All places follow in closed form.
    """
    on = functools.partial
    return Route(
        fits=on(_fits, hops),
        send=on(_send, hops),
        carry=on(_carry, hops, per_device, axis),
        receive=on(_receive, hops, per_device),
        rows_moved=hops.rows_moved,
    )


def _nearest(begin: jax.Array, remainder: jax.Array, modulus: int, plan: Plan) -> jax.Array:
    """The first position from `begin` on with (position + offset) mod modulus = remainder."""
    return begin + (remainder - plan.offset - begin) % modulus


def _fits(hops: Hops, plan: Plan) -> jax.Array:
    supplied = jnp.max(plan.first[1:] - plan.first[:-1])
    ok = -(-supplied // hops.across) <= hops.near
    if hops.along > 1:
        group = plan.first[:: hops.across]
        ok &= -(-jnp.max(group[1:] - group[:-1]) // hops.shards) <= hops.far
    return ok


def _send(hops: Hops, plan: Plan, me: jax.Array) -> jax.Array:
    across = hops.across
    start = _nearest(plan.first[me], jnp.arange(across, dtype=jnp.int32), across, plan)
    position = start[:, None] + across * jnp.arange(hops.near, dtype=jnp.int32)[None, :]
    return jnp.where(position < plan.first[me + 1], position, plan.first[me]).reshape(-1)


def _receive(hops: Hops, per_device: int, plan: Plan, me: jax.Array) -> jax.Array:
    return dealt_to(me, plan.offset, per_device, hops.shards)


def _carry(hops: Hops, per_device: int, axis: Axis, plan: Plan, me: jax.Array, packed: jax.Array) -> jax.Array:
    across, shards = hops.across, hops.shards
    groups = None if hops.along == 1 else hops.rows
    packed = lax.all_to_all(packed, axis, 0, 0, axis_index_groups=groups, tiled=True)
    position = _receive(hops, per_device, plan, me)
    if hops.along == 1:
        return packed[_after_first(hops, plan, position)]
    mine, b = me % across, me // across
    targets = mine + across * jnp.arange(hops.along, dtype=jnp.int32)
    onward = _nearest(plan.first[b * across], targets, shards, plan)
    onward = onward[:, None] + shards * jnp.arange(hops.far, dtype=jnp.int32)[None, :]
    packed = packed.at[_after_first(hops, plan, onward.reshape(-1))].get(mode="clip")
    packed = lax.all_to_all(packed, axis, 0, 0, axis_index_groups=hops.columns, tiled=True)
    group = source_of(plan, position) // across
    return packed[group * hops.far + (position - plan.first[group * across]) // shards]


def _after_first(hops: Hops, plan: Plan, position: jax.Array) -> jax.Array:
    """Where the rows of these positions are after the first hop."""
    source = source_of(plan, position)
    return source % hops.across * hops.near + (position - plan.first[source]) // hops.across
