"""What nodes publish about themselves, and when the others have it.

A daemon sends its record to every member. With hundreds of nodes nearly all of these messages change nothing, so a
record goes at once only to those who may act on it: to everybody if it tells of claims, models or leaving, or of an
owner that the receiver does not see; else to nodes that own, carry, serve or wait for anything. The others read what
they have missed when they next look at the swarm. What cannot have arrived, as the path is blocked, waits for both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from swarmd.discovery.records import NodeRecord

if TYPE_CHECKING:
    from support.virtual_swarm.node import VirtualNode
    from support.virtual_swarm.world import World

# So long it is taken for granted who is attentive.
FRESH_SECONDS = 0.02


class Board:
    """The latest record of each node, in the order in which they were sent."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._latest: dict[str, tuple[int, float, NodeRecord]] = {}
        self._sent: dict[str, NodeRecord] = {}
        self._attentive: tuple[float, list[VirtualNode]] = (-1.0, [])
        self.count = 0
        # Those that own or have owned anything.
        self.owners: dict[str, None] = {}
        # By node: those who do not see it.
        self.blind: dict[str, set[str]] = {node: set() for node in world.ids}

    def seed(self, nodes: Iterable[VirtualNode]) -> None:
        """These know each other's records."""
        self._sent |= {node.id: node.record for node in nodes}

    def forget(self, node: str) -> None:
        """It starts anew."""
        self._latest.pop(node, None)
        self._sent.pop(node, None)

    def publish(self, node: VirtualNode) -> None:
        """A node's record has changed."""
        if node.frozen:
            node.when_awake(lambda: self.publish(node))
            return
        world, record = self._world, node.record
        if record.instances:
            self.owners[node.id] = None
        before, self._sent[node.id] = self._sent.get(node.id), record
        wide = before is None or is_news(before, record)
        world.loop.call_later(world.rng.uniform(0.002, 0.02), self._deliver, node, record, wide)

    def _deliver(self, node: VirtualNode, record: NodeRecord, wide: bool) -> None:
        world, network = self._world, self._world.network
        self.count += 1
        self._latest.pop(node.id, None)
        self._latest[node.id] = (self.count, world.loop.time(), record)
        for receiver in list(network.nodes.values()) if wide else self._concerned(node, record):
            link = node.links.get(receiver.id)
            if link is None or receiver.id not in link.open:
                continue
            wait = world.rng.uniform(0, network.slow.get(receiver.id, 0.0) + network.slow.get(node.id, 0.0))
            if network.loss and world.rng.random() < 10 * network.loss:
                wait += 1.0  # heartbeats tell that it was missed
            if receiver.frozen or not network.reach(node.id, receiver.id):
                network.stall(link, receiver.id, lambda r=receiver: r.receive(record))
            elif wait:
                world.loop.call_later(wait, receiver.receive, record, link)
            else:
                receiver.receive(record)

    def _concerned(self, sender: VirtualNode, record: NodeRecord) -> list[VirtualNode]:
        """Who may act on a record that tells nothing new of its own node."""
        nodes = self._world.network.nodes
        at, attentive = self._attentive
        now = self._world.loop.time()
        if now - at > FRESH_SECONDS:
            attentive = [node for node in nodes.values() if node.is_attentive]
            self._attentive = (now, attentive)
        if not (blind := [self.blind[claim.owner] for claim in record.follows if self.blind[claim.owner]]):
            return attentive
        told = dict.fromkeys(attentive)
        ids = sorted(node for node in set().union(*blind) if node in sender.links and node in nodes)
        return list(told | dict.fromkeys(nodes[node] for node in ids))

    def missed(self, since: int) -> tuple[int, dict[str, tuple[float, NodeRecord]]]:
        """What was sent after `since`, with the times, and the number to ask from next."""
        found: dict[str, tuple[float, NodeRecord]] = {}
        for node in reversed(self._latest):
            number, at, record = self._latest[node]
            if number <= since:
                break
            found[node] = (at, record)
        return self.count, found


def is_news(old: NodeRecord, new: NodeRecord) -> bool:
    """Whether a record could lead to anything at a node that carries nothing."""
    if old.leaving != new.leaving or old.models != new.models:
        return True
    return old.instances is not new.instances and _claims(old) != _claims(new)


def _claims(record: NodeRecord) -> list[tuple[str, int, int]]:
    return [(one.id, one.epoch, one.term) for one in record.instances]
