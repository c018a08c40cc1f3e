"""The host tier: records in host memory, stored and read ahead while the devices train."""

from jaxcl.buffer.host.feed import HANDOVERS
from jaxcl.buffer.host.messages import Handover, HandoverError, Pending
from jaxcl.buffer.host.store import Store

__all__ = ["HANDOVERS", "Handover", "HandoverError", "Pending", "Store"]
