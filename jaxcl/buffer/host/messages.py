"""What devices and host tell each other: what goes to the store, and what is asked of it."""

import dataclasses
from typing import Any, NamedTuple

import jax

from jaxcl.buffer.draw import Plan
from jaxcl.errors import RunError


class HandoverError(RunError):
    """A hand-over is lost, late or doubled; the stored rows can no longer be trusted."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pending:
    """A draw whose rows are still on their way to the device.

    Attributes:
      picked: what is drawn: a `Plan`, leaves `[1, ...]`, or the ranks int32 `[r]` of this device's own rows.
      slot, label, id: int32 `[n]`, of the rows this device has to send; n is R for a plan and r without.
    """

    picked: Plan | jax.Array
    slot: jax.Array
    label: jax.Array
    id: jax.Array


class Handover(NamedTuple):
    """What a device hands over in a step.

    Attributes:
      step: int32 `[1]`.
      slot: int32 `[b]`, where each row is to be stored, unique; one out of range is not stored.
      rows: uint8 `[b, bytes]`, packed.
      send: int32 `[1, draws, n]`, the slots to be gathered after that for each draw.
      wide: bool `[1]`: whether all n are wanted; else the first few, see `Store`. The same on all devices.
    """

    step: Any
    slot: Any
    rows: Any
    send: Any
    wide: Any


@dataclasses.dataclass
class Asked:
    """A draw that was asked for, or an insert alone, of which `Store.catch_up` has still to store and gather the rows.

    Attributes:
      handover: of global arrays, which may still be computed; None once its rows are stored.
      staged: the draw, or ().
      arrived: its rows, uint8 `[N * n, bytes]`, once they are gathered.
    """

    handover: Handover | None
    staged: tuple[Pending, ...]
    arrived: jax.Array | None = None
