"""Which slot a candidate takes: pure functions of small integer metadata, never of the payload."""

from jaxcl.buffer.policy.base import Choose, Policy, share
from jaxcl.buffer.policy.by_class import class_balanced, class_random, herding
from jaxcl.buffer.policy.stream import fifo, reservoir
from jaxcl.errors import UserError

__all__ = ["POLICIES", "Choose", "Policy", "make_policy", "share"]

POLICIES = ("class_random", "reservoir", "class_balanced", "fifo", "herding")


def make_policy(
    name: str, *, capacity: int, shards: int, num_classes: int | None = None, accept: float | None = None
) -> Policy:
    """The policy called `name`, one of `POLICIES`, for a union of `capacity` rows over `shards` devices.

    Args:
      name: class_random | reservoir | class_balanced | fifo | herding.
      capacity: rows in the union, at least one a device.
      shards: N.
      num_classes: K, a static bound on the labels, for the policies by class.
      accept: of class_random, c/b.

    Raises:
      UserError: unknown name, a size out of range, or an argument the policy needs and did not get.
    """
    if name not in POLICIES:
        raise UserError(f"buffer.policy: {name!r} is unknown, choose one of {', '.join(POLICIES)}")
    if capacity < shards:
        raise UserError(
            f"buffer.capacity: {capacity} rows cannot be shared by {shards} devices, give at least {shards}"
        )
    if name == "reservoir":
        return reservoir(capacity, shards)
    if name == "fifo":
        return fifo(capacity, shards)
    if num_classes is None or num_classes < 1:
        raise UserError(f"buffer.policy: {name} needs num_classes, a positive number, got {num_classes}")
    if name == "class_balanced":
        return class_balanced(capacity, shards, num_classes)
    if name == "herding":
        return herding(capacity, shards, num_classes)
    if capacity < num_classes:
        raise UserError(
            f"buffer.capacity: {capacity} rows cannot hold {num_classes} classes, give at least {num_classes}"
        )
    if accept is None or not 0.0 < accept <= 1.0:
        raise UserError(f"buffer.policy: {name} needs accept = candidates / batch_size in (0, 1], got {accept}")
    return class_random(capacity, shards, num_classes, accept)
