"""Whom this node trusts, kept up to date: evictions, heard of and passed on, and the nodes that it knows.

A pump around pure parts: `Denials` (who is evicted) and `Pins` (who was ever here). The data dir is where commands
leave what they decide, because whoever may write there owns the node; so no endpoint has to be guarded for that.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from swarmd.node.cluster.dialler import WHAT_TO_DO
from swarmd.node.cluster.membership import MemberChange, MemberState
from swarmd.node.cluster.mesh import Mesh
from swarmd.node.cluster.pin_file import load_pins, save_pins
from swarmd.node.cluster.pins import Pins
from swarmd.node.cluster.rotations import Rotations
from swarmd.node.cluster.trust_messages import TellDenials
from swarmd.transport.denial_files import changed_at, read_denials, save_denial
from swarmd.transport.endpoint import Endpoint
from swarmd.transport.identity import Credentials
from swarmd.transport.link import Link, LinkClosed
from swarmd.transport.log_limit import LogLimit
from swarmd.transport.private_files import IdentityError
from swarmd.transport.statements import Denial, Denials, admit_all

log = logging.getLogger("swarmd.trust")

# A folder's time of change has the grain of the kernel's clock: what changed just now is looked at again.
_FRESH_NS = 2_000_000_000
PIN_SECONDS = 0.5


class Trust:
    """Evictions, known nodes and credentials of one daemon.

    `on_changed`: its stage processes are to read the data dir again, and, given the members of the swarm, to end links
    of another authority with anybody else.
    """

    def __init__(
        self,
        directory: Path,
        credentials: Credentials,
        endpoint: Endpoint,
        mesh: Mesh,
        *,
        name: str,
        on_changed: Callable[[tuple[str, ...] | None], None],
    ) -> None:
        self.denials = Denials(credentials.authority_keys())
        self.pins = Pins(credentials.node_id, name, load_pins(directory).nodes)
        self._own_id = credentials.node_id
        self._directory = directory
        self._endpoint = endpoint
        self._mesh = mesh
        self._on_changed = on_changed
        self._limit = LogLimit()
        self._pins_kept = time.monotonic() - PIN_SECONDS
        self.rotations = Rotations(directory, credentials, mesh, self._known, self._adopt)
        mesh.belong_to(credentials.swarm_tags)
        self._looked_at = changed_at(directory)
        read_denials(directory, self.denials)
        self._enforce()

    @property
    def swarm_tag(self) -> str:
        """The public name of this node's swarm."""
        return self.rotations.credentials.swarm_tag

    async def on_link(self, link: Link) -> None:
        """A link with a daemon is up: whatever it has missed is told."""
        self.rotations.on_link(link)
        if self.denials.all:
            await link.send(TellDenials(self.denials.all))

    def on_denials(self, link: Link, message: TellDenials) -> None:
        """A member tells of evictions; each counts by its signature, whoever brings it."""
        news, error = admit_all(self.denials, message.denials)
        if error is not None and self._limit.admit(f"denial {link.peer_id}", time.monotonic()) is not None:
            log.warning("%s sent a denial that does not count: %s", link.peer.name, error)
        self._take(news, source=link)

    def on_members(self, changes: Sequence[MemberChange]) -> None:
        """Members came or changed: who is new, and who has another name than before, is told."""
        now = int(time.time())
        for change in changes:
            member = self._mesh.membership.get(change.node_id)
            if member is None or change.state is not MemberState.ALIVE:
                continue
            notices = self.pins.meet(change.node_id, member.record.name, now, self.denials.refused)
            self._keep_pins()
            if notices and self._limit.admit(f"pin {change.node_id}", time.monotonic()) is not None:
                for notice in notices:
                    log.log(logging.WARNING if notice.grave else logging.INFO, "%s", notice.text)

    def tick(self) -> None:
        """Time passed: keep what changed, and see whether a command has evicted somebody."""
        self._keep_pins()
        changed = changed_at(self._directory)
        if changed and (changed != self._looked_at or time.time_ns() - changed < _FRESH_NS):
            self._looked_at = changed
            self._take(read_denials(self._directory, self.denials), source=None)
        self.rotations.tick()

    async def close(self) -> None:
        """Stop."""
        await self.rotations.close()

    def trouble(self, node_id: str) -> str:
        """What is suspicious about a node, for people; empty if nothing is."""
        return self.pins.trouble(node_id, self.denials.refused)

    def _keep_pins(self) -> None:
        """At once, so that a command knows whom the log names; but not for each of many."""
        now = time.monotonic()
        if self.pins.changed and now - self._pins_kept >= PIN_SECONDS:
            self.pins.changed, self._pins_kept = False, now
            save_pins(self._directory, self.pins.file)

    def _take(self, news: Iterable[Denial], source: Link | None) -> None:
        """Denials that were not known are kept, passed on, also to whom they concern, and enforced."""
        fresh = tuple(news)
        if not fresh:
            return
        for denial in fresh:
            self._say(denial)
            try:
                save_denial(self._directory, denial)
            except IdentityError as error:
                log.warning("an eviction holds only until this node ends: %s", error)
        for link in self._endpoint.links:
            if link is not source and link.peer.role == "daemon":
                # Without waiting: somebody who does not read must not keep its links for longer.
                with contextlib.suppress(LinkClosed):
                    link.send_soon(TellDenials(fresh))
        self._enforce()

    def _enforce(self) -> None:
        refused = self.denials.refused
        self._endpoint.refuse(refused)
        self._mesh.refuse([node for node in refused if node != self._own_id])
        self._on_changed(None)

    def _known(self) -> list[str]:
        """Who should have certificates of this swarm."""
        return [pin.id for pin in self.pins.file.nodes if pin.id not in self.denials.refused]

    def _adopt(self, credentials: Credentials, members: tuple[str, ...] | None) -> None:
        """This node's credentials have changed."""
        self._endpoint.adopt(credentials)
        self._mesh.belong_to(credentials.swarm_tags)
        self.denials.trust(credentials.authority_keys())
        self._enforce()
        if members is not None:
            self._endpoint.keep_only(members)
            self._on_changed(members)

    def _say(self, denial: Denial) -> None:
        who = f"{denial.name or 'a node'} ({denial.node[:12]})"
        if not denial.evicted:
            log.warning("node %s is no longer evicted and may take part again", who)
        elif denial.node == self._own_id:
            log.error("this node was %s: the members refuse it; %s", denial.reason, WHAT_TO_DO)
        else:
            log.warning("node %s was %s; links with it are closed and refused", who, denial.reason)
