"""Membership of one virtual node: the daemon's own `Membership`, with heartbeats that are computed, not sent."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from swarmd.discovery.records import NodeRecord
from swarmd.node.cluster.membership import (
    FORGET_SECONDS,
    GONE_SECONDS,
    SUSPECT_SECONDS,
    Member,
    MemberChange,
    Membership,
    MemberState,
)

if TYPE_CHECKING:
    from support.virtual_swarm.network import VirtualLink
    from support.virtual_swarm.world import World

TICK = 0.25


class Watcher(ABC):
    """Who is there, as one node sees it. `quiet` are the members of whom no heartbeat comes at present."""

    def __init__(self, world: World, node_id: str) -> None:
        self.world, self.network, self.id = world, world.network, node_id
        self.frozen = self.closed = False
        self.links: dict[str, VirtualLink] = {}
        self.quiet: dict[str, None] = {}
        self.membership = Membership()
        self._late: dict[str, tuple[float, NodeRecord]] = {}
        self._read = world.board.count
        self._timer: asyncio.TimerHandle | None = None
        self._arming: asyncio.TimerHandle | None = None
        for blind in world.board.blind.values():
            blind.add(node_id)

    @abstractmethod
    def react(self, changes: Sequence[MemberChange]) -> None:
        """Do what follows from changes of the members."""

    def report(self, changes: Sequence[MemberChange]) -> None:
        """As the mesh: hang up on who is gone, and tell the daemon."""
        blind = self.world.board.blind
        for change in changes:
            if change.state is MemberState.GONE:
                blind[change.node_id].add(self.id)
                link = self.links.get(change.node_id)
                if link is not None:
                    self.world.loop.call_soon(self.network.close_end, link, self.id)
            elif change.state is MemberState.ALIVE:
                blind[change.node_id].discard(self.id)
        if changes:
            self.react(changes)

    def greet(self, peer: Watcher, link: VirtualLink, record: NodeRecord) -> None:
        """A link and a record that were there from the beginning."""
        now = self.world.loop.time()
        self.links[peer.id] = link
        self.membership.on_linked(peer.id, now)
        self.membership.on_record(record, now)
        self.world.board.blind[peer.id].discard(self.id)

    def on_linked(self, peer: str, link: VirtualLink) -> None:
        self.links[peer] = link
        self.report(self.membership.on_linked(peer, self.world.loop.time()))
        self.touch(peer)

    def on_unlinked(self, peer: str, link: VirtualLink) -> None:
        if self.links.get(peer) is link:
            del self.links[peer]
            self._late.pop(peer, None)
        self.report(self.membership.on_unlinked(peer, self.world.loop.time()))
        self.touch(peer)

    def on_refused(self, peer: str) -> None:
        self.report(self.membership.on_refused(peer, self.world.loop.time()))

    def receive(self, record: NodeRecord, link: VirtualLink | None = None) -> None:
        """A record came over the link with its node (if given: over this one, unless it is closed)."""
        if link is None or self.links.get(record.id) is link:
            self._late.pop(record.id, None)
            self.report(self.membership.on_record(record, self.world.loop.time()))

    def catch_up(self) -> None:
        """Read the records that have arrived and changed nothing here."""
        self._read, missed = self.world.board.missed(self._read)
        self._late |= missed
        if not self._late:
            return
        now, slow = self.world.loop.time(), self.network.slow
        late, self._late = self._late, {}
        for sender, (at, record) in late.items():
            link = self.links.get(sender)
            if link is None or at < link.since:
                continue  # with a new link comes a new record
            if self.network.flows(self.id, sender) and now - at >= slow.get(sender, 0.0) + slow.get(self.id, 0.0):
                changes = self.membership.on_record(record, now)
                self.report([change for change in changes if change.joined or change.heard_again])
            else:
                self._late[sender] = (at, record)

    # What of it could lead to anything

    def shows(self, change: MemberChange) -> bool:
        """Whether this node's own record could tell of a change: of who is silent, or whom it follows."""
        member = self.membership.get(change.node_id)
        silent = member is None or member.state is not MemberState.ALIVE
        return silent or change.joined or change.heard_again or change.node_id in self.world.board.owners

    def may_inherit(self, models: Collection[str]) -> bool:
        """Whether an owner is gone, or leaves, whose instances a node could inherit that holds these models."""
        left = [m.record for m in self.owners() if m.record.leaving or m.state is MemberState.GONE]
        return any(
            record.model.name in models or any(stage.node == self.id for stage in record.stages)
            for node in left
            for record in node.instances
        )

    def owners(self) -> list[Member]:
        """The members that may own anything."""
        return [member for owner in self.world.board.owners if (member := self.membership.get(owner)) is not None]

    # Heartbeats

    def touch(self, *peers: str) -> None:
        """Heartbeats of these members may have begun to pass, or ended."""
        now = self.world.loop.time()
        for peer in peers:
            if self.membership.get(peer) is None:
                self.quiet.pop(peer, None)
            elif self.network.flows(self.id, peer):
                self.quiet.pop(peer, None)
                self.report(self.membership.on_heard(peer, now))
            elif peer not in self.quiet:
                self.quiet[peer] = None
                self.membership.on_heard(peer, now - self.world.rng.uniform(0, 0.5))
        if self._arming is None and self.quiet:
            self._arming = self.world.loop.call_later(0.01, self._arm)

    def _arm(self) -> None:
        """Set the time at which silence is noticed next."""
        self._arming = None
        now, due = self.world.loop.time(), []
        for peer in list(self.quiet):
            member = self.membership.get(peer)
            if member is None:
                self.quiet.pop(peer)
            elif member.state is MemberState.ALIVE:
                due.append(member.heard + SUSPECT_SECONDS)
            elif member.state is MemberState.SUSPECT:
                due.append(member.since + GONE_SECONDS)
            elif peer not in self.links:
                due.append(member.since + FORGET_SECONDS)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due:
            self._timer = self.world.loop.call_at(max(min(due), now) + self.world.rng.uniform(0.01, TICK), self.look)

    def look(self) -> None:
        """As the daemon every `TICK` seconds: notice who is silent."""
        if self.frozen or self.closed:
            return
        now = self.world.loop.time()
        for peer, member in self.membership._members.items():
            if peer not in self.quiet:
                member.heard = now  # a heartbeat has come in the meantime
        self.report(self.membership.tick(now))
        self._arm()
