"""A member that claims what is another's, to a running node: nothing changes, and one log line says why."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec import Struct
from msgspec.structs import replace
from support.forged import NOW
from support.link_fakes import Recorder, new_credentials
from support.quiet_swarm import QUIET
from support.swarm import Node

from swarmd.discovery.records import Address, NodeRecord
from swarmd.node.cluster.messages import DAEMON_MESSAGES, Gossip, KnownNode, Publish
from swarmd.node.cluster.trust_messages import RenewCertificate, SwitchAuthority, TellDenials
from swarmd.transport.endpoint import Endpoint, LinkRefused
from swarmd.transport.identity import Credentials
from swarmd.transport.link import PROTOCOL_VERSION, Hello, Link, RemoteError, Vocabulary
from swarmd.transport.messages import Role
from swarmd.transport.rotation import announce, certify, hand_over
from swarmd.transport.statements import deny
from swarmd.transport.token import JoinToken

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

OTHER = "e" * 64
THIEF = JoinToken(bytes(20))
TRIES = 3


class Poser:
    """A member with a link to the victim, by which it says what it likes."""

    def __init__(self, victim: Node, own: Credentials, endpoint: Endpoint, link: Link) -> None:
        self.victim, self.own, self.endpoint, self.link = victim, own, endpoint, link

    async def ask(self, message: Struct) -> str:
        """The refusal of a request."""
        with pytest.raises(RemoteError) as caught:
            await self.link.request(message, timeout=10)
        return str(caught.value)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("tampering") / "victim", *QUIET) as node:
        assert node.url
        yield node


class Quiet(Recorder):
    """Answers nothing."""

    async def on_request(self, link: Link, message: Struct, payload: bytearray) -> Any:
        raise RemoteError("unknown", "a poser answers nothing")


@asynccontextmanager
async def posing(victim: Node, name: str, role: Role = "daemon") -> AsyncIterator[Poser]:
    own = new_credentials(JoinToken.parse(await asyncio.to_thread(victim.token)))
    hello = Hello(PROTOCOL_VERSION, role, name, "test", note="0123456789abcdef")
    endpoint = Endpoint(own, Vocabulary(DAEMON_MESSAGES), Quiet(), hello=lambda: hello)
    try:
        link = await endpoint.dial("127.0.0.1", await asyncio.to_thread(lambda: victim.link_port), expect=victim.id)
        yield Poser(victim, own, endpoint, link)
    finally:
        await endpoint.close()


async def publishes_for_another(poser: Poser) -> None:
    await poser.link.send(Publish(NodeRecord(OTHER, "poser", "test", counter=1)))


async def publishes_an_unreadable_name(poser: Poser) -> None:
    await poser.link.send(Publish(NodeRecord(poser.own.node_id, "a\n12:00:00 I all is well", "test", counter=1)))


async def denies_without_the_token(poser: Poser) -> None:
    await poser.link.send(TellDenials((replace(deny(THIEF, OTHER, "x", 1, 1), swarm=poser.own.swarm_tag),)))


async def denies_in_another_swarms_name(poser: Poser) -> None:
    await poser.link.send(TellDenials((deny(THIEF, OTHER, "x", 1, 1),)))


async def offers_an_authority_of_its_own(poser: Poser) -> None:
    offer = replace(announce(THIEF, THIEF, 1), swarm=poser.own.swarm_tag)
    certificate = certify(poser.link.peer_certificate, THIEF, NOW)
    assert "signature is not of this swarm's authority" in await poser.ask(RenewCertificate(offer, certificate))


async def orders_to_switch(poser: Poser) -> None:
    order = replace(hand_over(THIEF, THIEF, [OTHER]), swarm=poser.own.swarm_tag)
    assert "holds no certificate of the new authority" in await poser.ask(SwitchAuthority(order))


CLAIMS: list[tuple[Callable[[Poser], Awaitable[None]], str]] = [
    (publishes_for_another, "{name} sent a record of another node, or under no readable name"),
    (publishes_an_unreadable_name, "{name} sent a record of another node, or under no readable name"),
    (denies_without_the_token, "{name} sent a denial that does not count: its signature is not"),
    (denies_in_another_swarms_name, "{name} sent a denial that does not count: it is of another swarm"),
    (
        offers_an_authority_of_its_own,
        "change of the join token that {name} asks for is refused: its signature is not",
    ),
    (orders_to_switch, "a change of the join token that {name} asks for is refused: this node holds no certificate"),
]


@pytest.mark.parametrize(("claim", "says"), CLAIMS, ids=lambda value: getattr(value, "__name__", ""))
async def test_a_claim_of_a_member(victim: Node, claim: Callable[[Poser], Awaitable[None]], says: str) -> None:
    before = await asyncio.to_thread(victim.get, "/api/swarm")
    name = claim.__name__[:40]
    async with posing(victim, name) as poser:
        for _ in range(TRIES):
            await claim(poser)
        line = says.format(name=name)
        await asyncio.to_thread(victim.until_said, re.escape(line))
        # An answer comes after whatever was sent before.
        await poser.ask(SwitchAuthority(hand_over(THIEF, THIEF, [])))
    after = await asyncio.to_thread(victim.get, "/api/swarm")
    assert victim.log.count(line) == 1
    assert [n["id"] for n in after["nodes"]] == [n["id"] for n in before["nodes"]]
    assert (after["swarm"], after["rotation"], after["evicted"]) == (before["swarm"], "", [])
    assert not any(line.rstrip().endswith("all is well") and line.startswith("12:00:00") for line in victim.output)


async def test_a_stage_process_of_another_node(victim: Node) -> None:
    async with posing(victim, "stage-poser", role="stage") as poser:
        await poser.link.wait_closed()
    await asyncio.to_thread(victim.until_said, "refused a connection .*has not started that stage process")


async def test_an_address_given_out_for_another_node(victim: Node) -> None:
    """The victim dials it, finds the poser in place of who it looks for, and says so."""
    async with posing(victim, "liar") as poser:
        port = await poser.endpoint.listen("127.0.0.1", 0)
        await poser.link.send(Gossip((KnownNode(OTHER, (Address("127.0.0.1", port),)),)))
        says = f"node {OTHER[:12]} cannot be reached at any of its addresses: it is node {poser.own.node_id[:12]}, not"
        await asyncio.to_thread(victim.until_said, says)
    state = await asyncio.to_thread(victim.get, "/api/swarm")
    assert OTHER not in {node["id"] for node in state["nodes"]}


async def test_a_member_that_was_evicted(victim: Node) -> None:
    async with posing(victim, "outcast") as poser:
        await poser.link.send(Publish(NodeRecord(poser.own.node_id, "outcast", "test", counter=1)))
        await asyncio.to_thread(victim.until_said, "new node outcast")
        await asyncio.to_thread(victim.command, "evict", "outcast")
        await poser.link.wait_closed()
        assert "evicted from this swarm on" in poser.link.close_reason
        for _ in range(TRIES):
            with pytest.raises(LinkRefused, match="it refused: evicted from this swarm on") as caught:
                await poser.endpoint.dial("127.0.0.1", victim.link_port)
            assert caught.value.evicted
    says = f"refused a connection from .*: node {poser.own.node_id[:12]} is evicted from this swarm on"
    await asyncio.to_thread(victim.until_said, says)
    assert len(re.findall(says, victim.log)) == 1
