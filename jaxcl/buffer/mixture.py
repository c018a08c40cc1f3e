"""Several buffers that are drawn from together, in stated shares: such as the latest rows and a sample of all.

    mixture = make_mixture(record, representatives=64, mesh=mesh, parts={
        "recent": {"share": 1, "policy": "fifo", "capacity": 1000},
        "old": {"share": 3, "policy": "reservoir", "capacity": 20000},
    })

A draw holds 16 rows of the one and 48 of the other, whatever they hold: each part keeps its own law, and where one has fewer
rows than its share the rest of its places is invalid.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxcl import mesh as mesh_lib
from jaxcl.buffer import threefry as random
from jaxcl.buffer.make import Buffer, make_buffer
from jaxcl.buffer.shard import Drawn, Rows, Shard
from jaxcl.check import Rule, check, one_of, refused
from jaxcl.errors import UserError
from jaxcl.types import PyTree

State = dict[str, Shard]
_COUNT = Rule(lambda x: isinstance(x, numbers.Integral) and x is not True and int(x) > 0, "a positive integer")


@dataclasses.dataclass(frozen=True)
class LocalMixture:
    """The functions of `Mixture` for use inside an existing `shard_map`, on this device's part of everything."""

    init: Callable[[], State]
    insert: Callable[..., State]
    draw: Callable[[State, jax.Array], Drawn]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """As `Buffer`, over several. A state is a dict of their states.

    Attributes:
      init: `() -> state`.
      insert: `(state, rows, key, into=names) -> state`: each of the parts named, or of all, is offered the rows.
      draw: `(state, key) -> Drawn` of `representatives` rows.
      insert_and_draw: `(state, rows, key, into=names) -> (state, Drawn)`, compiled, in place: the states of the parts that take
        rows are donated.
      size: `(state) -> int32 scalar`, rows stored in all parts, copies included.
      can_draw: `(state) -> bool scalar`, whether each part holds as many rows as its share of a draw.
      stats: `(state) -> dict` of those of each part.
      local: init, insert and draw for use inside `shard_map`.
      parts: the buffers, for what concerns one of them: `mixture.parts["old"].save(state["old"], folder)`.
      rows: how many rows of each part a device has in a draw. They stand in this order: with {"recent": 2, "old": 6} rows 0 and
        1 of each device's 8 are recent ones, so that of `[R]` global rows number i is one if i % 8 < 2.
      representatives: as given.
      num_bytes: bytes of all parts over all devices.
    """

    init: Callable[[], State]
    insert: Callable[..., State]
    draw: Callable[[State, jax.Array], Drawn]
    insert_and_draw: Callable[..., tuple[State, Drawn]]
    size: Callable[[State], jax.Array]
    can_draw: Callable[[State], jax.Array]
    stats: Callable[[State], dict[str, dict[str, Any]]]
    local: LocalMixture
    parts: dict[str, Buffer]
    rows: dict[str, int]
    representatives: int
    num_bytes: int


def make_mixture(
    record: PyTree,
    *,
    representatives: int,
    parts: Mapping[str, Mapping[str, Any]],
    mesh: Mesh | None = None,
    axis: str | Sequence[str] = mesh_lib.DATA,
    **common: Any,
) -> Mixture:
    """Several buffers for the same rows.

    Args:
      record, mesh, axis: as of `make_buffer`.
      representatives: rows of a draw from all parts together.
      parts: by name, the options of `make_buffer` and "share", a positive integer: of every draw this part has
        representatives * share / (sum of the shares) rows, which must be a multiple of the number of devices.
      common: options of `make_buffer` for all parts that do not have their own.

    Raises:
      UserError: a share or an option that is not allowed; it names the part.
    """
    check("parts", parts, Rule(lambda x: isinstance(x, Mapping) and len(x) > 0, "at least one, by name"))
    check("representatives", representatives, _COUNT)
    for name, options in parts.items():
        check(f"parts.{name}.share", options.get("share"), _COUNT)
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    shards = 1 if mesh is None else math.prod(mesh.shape.get(name, 1) for name in names)
    total = sum(options["share"] for options in parts.values())
    made, rows = {}, {}
    for name, options in parts.items():
        rows[name], rest = divmod(representatives * options["share"], total * shards)
        if rest or not rows[name]:
            of = f"{representatives} * {options['share']} / {total}"
            allowed = f"such that of {name}, {of}, is a multiple of the number of devices, {shards}"
            raise refused("representatives", representatives, allowed)
        given = {**common, **options, "representatives": rows[name] * shards, "mesh": mesh, "axis": axis}
        del given["share"]
        try:
            made[name] = make_buffer(record, **given)
        except UserError as error:
            raise UserError(f"parts.{name}: {error}") from error
    return _bind(made, rows, mesh, PartitionSpec(names))


def _bind(parts: dict[str, Buffer], rows: dict[str, int], mesh: Mesh | None, spec: PartitionSpec) -> Mixture:
    join = jax.jit(_join if mesh is None else mesh_lib.over_mesh(mesh, _join, (spec,), spec))
    local = {name: part.local for name, part in parts.items()}
    draws = {name: jax.jit(part.draw) if part.host is None else part.draw for name, part in parts.items()}
    return Mixture(
        init=functools.partial(_init, parts),
        insert=functools.partial(_insert, parts),
        draw=lambda state, key: join(_draws(draws, state, key)),
        insert_and_draw=functools.partial(_insert_and_draw, parts, draws, join),
        size=lambda state: sum((part.size(state[name]) for name, part in parts.items()), jnp.int32(0)),
        can_draw=lambda state: jnp.all(jnp.stack([part.can_draw(state[name]) for name, part in parts.items()])),
        stats=lambda state: {name: part.stats(state[name]) for name, part in parts.items()},
        local=LocalMixture(
            init=functools.partial(_init, local),
            insert=functools.partial(_insert, local),
            draw=lambda state, key: _join(_draws({name: part.draw for name, part in local.items()}, state, key)),
        ),
        parts=parts,
        rows=rows,
        representatives=sum(part.representatives for part in parts.values()),
        num_bytes=sum(part.num_bytes for part in parts.values()),
    )


# Of parts, `Buffer` or `Local`, by name.


def _init(parts: Mapping[str, Any]) -> State:
    return {name: part.init() for name, part in parts.items()}


def _insert(
    parts: Mapping[str, Any], state: State, rows: Rows, key: jax.Array, into: Sequence[str] | None = None
) -> State:
    given, keys = _taking(parts, into), _keys(parts, key)
    return {
        name: part.insert(state[name], rows, keys[name]) if name in given else state[name]
        for name, part in parts.items()
    }


def _draws(draws: Mapping[str, Callable], state: State, key: jax.Array) -> list[Drawn]:
    keys = _keys(draws, key)
    return [draw(state[name], keys[name]) for name, draw in draws.items()]


def _insert_and_draw(
    parts: Mapping[str, Buffer],
    draws: Mapping[str, Callable],
    join: Callable[[list[Drawn]], Drawn],
    state: State,
    rows: Rows,
    key: jax.Array,
    into: Sequence[str] | None = None,
) -> tuple[State, Drawn]:
    given, keys, after, drawn = _taking(parts, into), _keys(parts, key), {}, []
    for name, part in parts.items():
        if name in given:
            after[name], one = part.insert_and_draw(state[name], rows, keys[name])
        else:
            after[name], one = state[name], draws[name](state[name], keys[name])
        drawn.append(one)
    return after, join(drawn)


def _taking(parts: Mapping[str, Any], into: Sequence[str] | None) -> Sequence[str]:
    for name in into or ():
        check("into", name, one_of(parts))
    return tuple(parts) if into is None else into


def _keys(parts: Mapping[str, Any], key: jax.Array) -> dict[str, jax.Array]:
    """A key for each part, by its number."""
    return {name: random.fold_in(key, jnp.int32(number)) for number, name in enumerate(parts)}


def _join(drawn: list[Drawn]) -> Drawn:
    """The rows of all parts, one behind the other; fields that a part does not have are None."""
    fields = {}
    for field in dataclasses.fields(Drawn):
        values = [getattr(one, field.name) for one in drawn]
        if all(value is not None for value in values):
            fields[field.name] = jax.tree.map(lambda *x: jnp.concatenate(x), *values)
    return Drawn(**fields)
