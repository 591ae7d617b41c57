"""The full mesh of links between daemons: dials who is known, keeps one link per node, carries records and heartbeats.

A thin pump around two pure parts: the dial book (whom to dial) and the membership (who is there).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence

from msgspec import Struct

from swarmd.discovery.dial_book import DialBook
from swarmd.discovery.mdns import Sighting
from swarmd.discovery.peers import PeerAddress
from swarmd.discovery.records import NodeRecord
from swarmd.node.cluster.dialler import Dialler
from swarmd.node.cluster.membership import MemberChange, Membership, MemberState
from swarmd.node.cluster.messages import Gossip, Heartbeat, HeartbeatEcho, KnownNode, Publish
from swarmd.transport.endpoint import Endpoint
from swarmd.transport.link import Link, LinkClosed
from swarmd.transport.log_limit import LogLimit

log = logging.getLogger("swarmd.cluster")

TICK_SECONDS = 0.25
HEARTBEAT_SECONDS = 0.5
# Back-pressure for so long is a missed message.
SEND_SECONDS = 1.0

OnChange = Callable[[Sequence[MemberChange]], None]


class Mesh:
    """This node's links to the other daemons and its view of who is there.

    `own_record` is asked for whenever this node's record is sent; `on_change` hears of every change of membership.
    """

    def __init__(
        self, endpoint: Endpoint, swarm_tag: str, own_record: Callable[[], NodeRecord], on_change: OnChange
    ) -> None:
        self.membership = Membership()
        self.rtt_ms: dict[str, float] = {}
        self._endpoint = endpoint
        self._swarm_tags = frozenset({swarm_tag})
        self._own_record = own_record
        self._on_change = on_change
        self._links: dict[str, Link] = {}
        self._book = DialBook(endpoint.node_id)
        self._dialler = Dialler(endpoint, self._book, self._links.__contains__, self._on_refused)
        self._superseded: dict[Link, Link] = {}
        self._unheard: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: set[str] = set()
        self._limit = LogLimit()
        self._told = 0
        self._wake = asyncio.Event()

    def link_to(self, node_id: str) -> Link | None:
        """The link to a node, if one is up."""
        return self._links.get(node_id)

    @property
    def links(self) -> list[Link]:
        """The links to other daemons that are up, one per node."""
        return list(self._links.values())

    def belong_to(self, swarm_tags: frozenset[str]) -> None:
        """The public names that the swarm has from now on: two, while its token is changed."""
        self._swarm_tags = swarm_tags

    def add_static(self, peers: Sequence[PeerAddress]) -> None:
        """Peers named by a person."""
        for peer in peers:
            self._book.note_static(peer, time.monotonic())

    def refuse(self, nodes: Sequence[str]) -> None:
        """These nodes are evicted: they are gone at once, and not dialled; the endpoint refuses them."""
        self._book.refuse(nodes)
        self._report([change for node in nodes for change in self.membership.expel(node, time.monotonic())])

    def on_sighting(self, sighting: Sighting) -> None:
        """mDNS saw a node. Other swarms' nodes are named once and left alone."""
        if sighting.swarm_tag not in self._swarm_tags:
            if sighting.node_id not in self._strangers and len(self._strangers) < 1024:
                self._strangers.add(sighting.node_id)
                log.info(
                    "node %s on this network belongs to another swarm (its join token differs); not dialled",
                    sighting.node_id[:12],
                )
            return
        self._book.note_sighting(sighting.node_id, sighting.addresses, time.monotonic())
        self._wake.set()

    async def run(self) -> None:
        """Dial, beat and watch the time until cancelled."""
        for beat in itertools.count():
            now = time.monotonic()
            self._dialler.dial_due(now)
            self._report(self.membership.tick(now))
            if beat % round(HEARTBEAT_SECONDS / TICK_SECONDS) == 0:
                self._told = self._own_record().counter
                await self._send_all(Heartbeat(self._told, now))
            self._wake.clear()
            try:
                async with asyncio.timeout(TICK_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def publish(self) -> None:
        """Send this node's record, which has changed, to everybody."""
        await self._send_all(Publish(self._own_record()))

    async def close(self) -> None:
        """Stop dialling; the endpoint closes the links."""
        await self._dialler.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def on_link(self, link: Link) -> None:
        """A link with a daemon is up: introduce this node."""
        now = time.monotonic()
        address = link.remote_address if link.initiator else None
        self._book.note_linked(link.peer_id, address, now)
        self._report(self.membership.on_linked(link.peer_id, now))
        rival = self._links.get(link.peer_id)
        if rival is None or self._is_better(link, rival):
            self._links[link.peer_id] = link
        surplus = self._surplus(link, rival)
        await link.send(Publish(self._own_record()))
        if surplus is not None:
            if surplus is link:
                self._close_surplus(surplus)
            else:
                self._superseded[link] = surplus
            return
        self._unheard.add(link)

    async def on_message(self, link: Link, message: Struct) -> None:
        """A message of another daemon's control plane."""
        now = time.monotonic()
        match message:
            case Publish(record=record):
                if record.id != link.peer_id or not record.name.isprintable():
                    if self._limit.admit(f"record {link.peer_id}", now) is not None:
                        log.warning("%s sent a record of another node, or under no readable name", link.peer.name)
                    return
                self._note_addresses(record, link)
                self._report(self.membership.on_record(record, now))
                # The other side knows of the better link only now: had the lesser one gone before, so had this node.
                if (lesser := self._superseded.pop(link, None)) is not None:
                    self._close_surplus(lesser)
                if link in self._unheard:
                    self._unheard.discard(link)
                    self._keep(asyncio.create_task(self._gossip(link)))
            case Heartbeat(sent_at=sent_at):
                self._report(self.membership.on_heard(link.peer_id, now))
                member = self.membership.get(link.peer_id)
                await self._send(link, HeartbeatEcho(sent_at, member.record.counter if member is not None else 0))
            case HeartbeatEcho(sent_at=sent_at, known=known):
                self._report(self.membership.on_heard(link.peer_id, now))
                if known < self._told:
                    await self._send(link, Publish(self._own_record()))
                self.rtt_ms[link.peer_id] = max(0.0, (now - sent_at) * 1000)
            case Gossip(nodes=nodes):
                for node in nodes:
                    self._book.note_gossip(node.id, [(a.host, a.port) for a in node.addresses], now)
                self._wake.set()
            case _:
                if self._limit.admit(f"stray {link.peer_id}", now) is not None:
                    log.warning("%s sent %s, which nobody asked for", link.peer.name, type(message).__name__)

    async def on_closed(self, link: Link) -> None:
        """A link with a daemon is down."""
        now = time.monotonic()
        self._superseded.pop(link, None)
        self._unheard.discard(link)
        if self._links.get(link.peer_id) is link:
            del self._links[link.peer_id]
            self.rtt_ms.pop(link.peer_id, None)
            other = next(
                (o for o in self._endpoint.links if o.peer_id == link.peer_id and _usable(o) and o is not link),
                None,
            )
            if other is not None:
                self._links[link.peer_id] = other
            else:
                self._dialler.on_lost(link, now)
        self._report(self.membership.on_unlinked(link.peer_id, now))
        self._wake.set()

    def _on_refused(self, node_id: str, now: float) -> None:
        self._report(self.membership.on_refused(node_id, now))

    def _hang_up(self, node_id: str) -> None:
        """Of a dead connection neither side may hear for minutes: a node that comes back is to find a new link."""
        link = self._links.get(node_id)
        if link is not None:
            self._keep(asyncio.create_task(link.close("nothing was heard for too long")))

    def _is_better(self, link: Link, rival: Link) -> bool:
        """Both sides keep the link that the lower id dialled; of two dialled by one side, the first."""
        if rival.closed:
            return True
        return link.initiator != rival.initiator and self._dialled_by_lower(link)

    def _surplus(self, link: Link, rival: Link | None) -> Link | None:
        """The link to close, if it is this side's to close: the dialler closes what it dialled in vain."""
        if rival is None or rival.closed:
            return None
        loser = rival if self._links[link.peer_id] is link else link
        return loser if loser.initiator else None

    def _close_surplus(self, link: Link) -> None:
        self._keep(asyncio.create_task(link.close("another link with the same node is kept")))

    def _dialled_by_lower(self, link: Link) -> bool:
        return link.initiator == (self._endpoint.node_id < link.peer_id)

    def _note_addresses(self, record: NodeRecord, link: Link) -> None:
        """Where a member may be reached later: what it says, and the host that this link shows."""
        addresses = [(a.host, a.port) for a in record.addresses]
        ports = {port for _, port in addresses}
        if len(ports) == 1:
            addresses.append((link.remote_address[0], ports.pop()))
        self._book.note_gossip(record.id, addresses, time.monotonic())

    async def _gossip(self, new: Link) -> None:
        """Make the nodes known to each other. Not before the new one's record is here: of two that come at the same
        time, the second must hear of the first."""
        nodes = []
        for node_id in self._links:
            member = self.membership.get(node_id)
            if member is not None and member.state is not MemberState.GONE:
                nodes.append(KnownNode(node_id, member.record.addresses))
        gossip = Gossip(tuple(nodes[:512]))
        others = [link for node, link in self._links.items() if node != new.peer_id]
        await asyncio.gather(*(self._send(link, gossip) for link in [new, *others]))

    def _keep(self, task: asyncio.Task[None]) -> None:
        """The event loop alone does not keep a task alive."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_all(self, message: Struct) -> None:
        await asyncio.gather(*(self._send(link, message) for link in list(self._links.values())))

    async def _send(self, link: Link, message: Struct) -> None:
        """One that is stuck must not hold up the others."""
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await link.send(message)
        except (LinkClosed, TimeoutError):
            pass

    def _report(self, changes: Sequence[MemberChange]) -> None:
        for change in changes:
            member = self.membership.get(change.node_id)
            name = member.record.name if member is not None else "?"
            if change.joined:
                log.info("node %s (%s) is a member", name, change.node_id[:12])
            elif change.state is not MemberState.ALIVE:
                log.warning("node %s (%s) is %s", name, change.node_id[:12], change.state)
            if change.state is MemberState.GONE:
                self._hang_up(change.node_id)
        if changes:
            self._on_change(changes)


def _usable(link: Link) -> bool:
    return link.peer.role == "daemon" and not link.closed
