"""Who is told of whom, when links with other daemons come up."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from msgspec import Struct

from swarmd.discovery.records import Address, NodeRecord
from swarmd.node.cluster.mesh import Mesh
from swarmd.node.cluster.messages import Gossip, Publish


def node_id(number: int) -> str:
    return f"{number:064x}"


def record(number: int) -> NodeRecord:
    return NodeRecord(node_id(number), f"node{number}", "1", 1, (Address("127.0.0.1", 7000 + number),))


class FakeLink:
    """A link that was accepted, and what was sent over it."""

    def __init__(self, number: int) -> None:
        self.peer_id = node_id(number)
        self.peer = SimpleNamespace(name=f"node{number}", role="daemon")
        self.initiator = self.closed = False
        self.remote_address = ("127.0.0.1", 40000 + number)
        self.sent: list[Struct] = []

    async def send(self, message: Struct) -> None:
        self.sent.append(message)

    def told_of(self) -> set[str]:
        return {node.id for message in self.sent if isinstance(message, Gossip) for node in message.nodes}


async def meet(*steps: tuple[str, int]) -> dict[int, FakeLink]:
    """Links come up and records arrive in this order."""
    endpoint: Any = SimpleNamespace(node_id=node_id(0), links=())
    mesh = Mesh(endpoint, "tag", lambda: record(0), lambda _: None)
    links: dict[int, Any] = {}
    for what, number in steps:
        link = links.setdefault(number, FakeLink(number))
        if what == "link":
            await mesh.on_link(link)
        else:
            await mesh.on_message(link, Publish(record(number)))
    await asyncio.sleep(0)  # what was begun is done: nothing that is sent to waits
    await asyncio.sleep(0)
    await mesh.close()
    return links


async def test_a_new_node_and_those_there_hear_of_each_other():
    links = await meet(("link", 1), ("record", 1), ("link", 2), ("record", 2))
    assert node_id(1) in links[2].told_of()
    assert node_id(2) in links[1].told_of()


async def test_nodes_that_come_at_the_same_time_hear_of_each_other():
    links = await meet(("link", 1), ("link", 2), ("record", 1), ("record", 2))
    assert node_id(1) in links[2].told_of()
    assert node_id(2) in links[1].told_of()


async def test_records_that_follow_the_first_tell_nobody_anything():
    links = await meet(("link", 1), ("record", 1), ("link", 2), ("record", 2), ("record", 2), ("record", 2))
    assert sum(isinstance(message, Gossip) for message in links[1].sent) == 2
