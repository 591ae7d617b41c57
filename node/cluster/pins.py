"""The nodes that this one has ever met, by id: so that a new one is noticed, and a name that changes hands. Pure.

A node's id is its key and cannot be taken by another; its name is what it says. People know machines by name, so what
happens to names is told. Time is passed in Unix seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta, Struct

from swarmd.discovery.records import Count, NodeId
from swarmd.transport.messages import one_line

MAX_PINS = 1024
MAX_NAME = 64
# Of an id, for a person who means a node.
LEAST_DIGITS = 4
NEW_SECONDS = 24 * 3600
# When a node was seen last is kept no finer than this, so that the file is not written all the time.
SEEN_SECONDS = 3600


class Pin(Struct, frozen=True):
    """A node that was a member once: what it called itself last, and when it was first and last seen."""

    id: NodeId
    name: Annotated[str, Meta(max_length=MAX_NAME)]
    first_seen: Count
    last_seen: Count


class PinFile(Struct, frozen=True):
    """What is kept on disk."""

    nodes: Annotated[tuple[Pin, ...], Meta(max_length=MAX_PINS)] = ()


class Notice(Struct, frozen=True):
    """Something that a person should hear; `grave` if it may be somebody who poses as another."""

    text: str
    grave: bool = False


class Pins:
    """Every node met, the longest unseen forgotten beyond `MAX_PINS`. `changed`: it is to be kept."""

    def __init__(self, own_id: str, own_name: str, kept: Iterable[Pin] = ()) -> None:
        self._own_id = own_id
        self._own_name = own_name
        self._pins = {pin.id: pin for pin in kept}
        self.changed = False

    @property
    def file(self) -> PinFile:
        """What to keep, in the order in which the nodes were first seen."""
        return PinFile(tuple(sorted(self._pins.values(), key=lambda pin: (pin.first_seen, pin.id))))

    def get(self, node_id: str) -> Pin | None:
        """What is known of a node."""
        return self._pins.get(node_id)

    def meet(self, node_id: str, name: str, now: int, evicted: Iterable[str] = ()) -> list[Notice]:
        """A node is a member, under this name; what is worth telling about that."""
        name = one_line(name, MAX_NAME)
        known = self._pins.get(node_id)
        if known is not None and known.name == name:
            if now - known.last_seen >= SEEN_SECONDS:
                self._put(Pin(node_id, name, known.first_seen, now))
            return []
        self._put(Pin(node_id, name, now if known is None else known.first_seen, now))
        if known is None:
            notices = [Notice(f"new node {name} ({node_id[:12]}) joined; it was never seen before")]
        else:
            notices = [Notice(f"node {node_id[:12]}, known as {known.name}, now calls itself {name}", grave=True)]
        trouble = self.trouble(node_id, evicted)
        return [*notices, Notice(trouble, grave=True)] if trouble else notices

    def trouble(self, node_id: str, evicted: Iterable[str] = ()) -> str:
        """What is suspicious about a node: that another one was known by its name before; empty if nothing is.

        Nodes that are evicted have lost their names.
        """
        pin = self._pins.get(node_id)
        if pin is None:
            return ""
        if pin.name == self._own_name:
            return f"node {node_id[:12]} says the name of this node itself, {pin.name}"
        gone = set(evicted)
        others = [p for p in self._pins.values() if p.name == pin.name and p.id != node_id and p.id not in gone]
        first = min(others, key=lambda p: (p.first_seen, p.id), default=None)
        if first is None or (pin.first_seen, pin.id) < (first.first_seen, first.id):
            return ""
        return (
            f"node {pin.name} was known as {first.id[:12]}, now another key, {node_id[:12]}, says that name; if that "
            f"machine was set up anew, `swarmd evict {first.id[:12]}`, else find out who {node_id[:12]} is"
        )

    def is_new(self, node_id: str, now: int) -> bool:
        """Whether a node was first seen within the last day."""
        pin = self._pins.get(node_id)
        return pin is not None and now - pin.first_seen < NEW_SECONDS

    def _put(self, pin: Pin) -> None:
        self._pins[pin.id] = pin
        self.changed = True
        if len(self._pins) > MAX_PINS:
            del self._pins[min(self._pins, key=lambda node: self._pins[node].last_seen)]


def find(pins: Iterable[Pin], wanted: str) -> list[Pin]:
    """The nodes that a person may mean: by exact name, else by the beginning of the id (four digits or more)."""
    known = list(pins)
    named = [pin for pin in known if pin.name == wanted]
    if named or len(wanted) < LEAST_DIGITS:
        return named
    return [pin for pin in known if pin.id.startswith(wanted.lower())]
