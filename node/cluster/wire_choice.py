"""In which type hidden states travel over each link of a pipeline. Pure."""

from __future__ import annotations

from typing import NamedTuple

from swarmd.discovery.records import WireWish
from swarmd.node.serving.messages import WireDtype

_BITS: dict[WireDtype, int] = {"f32": 32, "f16": 16, "bf16": 16, "q8": 9}
"""Bits of a value on the wire."""
_HALF_PRECISION = ("cuda", "metal")
"""Kinds of devices whose backends compute in bf16: what they send has no more than that."""


class LinkEnd(NamedTuple):
    """A stage at one end of a link: its device's kind, and what its node wishes for its own links."""

    device: str
    wish: WireWish


def link_dtype(owner: WireWish, sender: LinkEnd, receiver: LinkEnd) -> WireDtype:
    """What the sender sends to the receiver.

    The owner's wish counts for the whole instance. Without one, that of an end: whoever is behind a slow link says so,
    and of two wishes the one with fewer bytes counts. Without any it is bf16 where an end computes in bf16, and f32
    between ends that both compute in fp32: there bf16 would be the one thing that makes a split model answer otherwise
    than the whole.
    """
    if owner != "auto":
        return owner
    wishes: list[WireDtype] = [end.wish for end in (sender, receiver) if end.wish != "auto"]
    if wishes:
        return min(wishes, key=lambda wish: _BITS[wish])
    return "bf16" if {sender.device, receiver.device} & set(_HALF_PRECISION) else "f32"
