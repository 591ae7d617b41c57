"""The network of a virtual swarm: one link for each two nodes, delays, loss, cuts and partitions.

A link behaves as TCP does. While its path is blocked, or the machine at its end stands still, nothing arrives, and what
was sent arrives when that is over, unless the receiver has closed its end. A message that is lost for good takes its
link with it. Heartbeats are not sent one by one: `flows` tells whether they would arrive.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import Struct

from swarmd.transport.link import LinkClosed, RemoteError

if TYPE_CHECKING:
    from support.virtual_swarm.node import VirtualNode

BACKOFF = (0.0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5)
LAST_BACKOFF = 30.0
WAVE = 0.25
Pair = frozenset[str]


@dataclass(eq=False)
class VirtualLink:
    """One connection; each end may be open while the other is not."""

    ends: tuple[str, str]
    open: set[str]
    since: float = 0.0
    waiting: dict[str, dict[asyncio.Future[Struct], None]] = field(default_factory=dict)
    # What is under way to each end and cannot arrive at present.
    stalled: dict[str, list[Callable[[], None]]] = field(default_factory=dict)
    busy_until: dict[str, float] = field(default_factory=dict)

    def other(self, node: str) -> str:
        """The node at the other end."""
        return self.ends[1] if node == self.ends[0] else self.ends[0]


class Network:
    """Who can reach whom, and what travels."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.nodes: dict[str, VirtualNode] = {}  # those whose daemon runs
        self.group: dict[str, int] = {}
        self.cuts: dict[Pair, None] = {}
        self.loss = 0.0
        self.slow: dict[str, float] = {}
        self.unlinked: dict[Pair, float] = {}
        self.lost_messages = self.links_made = 0
        self._stalled: dict[VirtualLink, None] = {}
        self.on_paths_changed: list[Callable[[], None]] = []

    def reach(self, one: str, other: str) -> bool:
        """Whether packets travel between two machines."""
        if one == other:
            return True
        return self.group.get(one, 0) == self.group.get(other, 0) and frozenset((one, other)) not in self.cuts

    def awake(self, node: str) -> bool:
        """Whether a node's daemon runs and is not frozen."""
        there = self.nodes.get(node)
        return there is not None and not there.frozen

    def flows(self, one: str, other: str) -> bool:
        """Whether heartbeats pass between two nodes."""
        here = self.nodes.get(one)
        link = here.links.get(other) if here is not None else None
        if link is None or len(link.open) < 2:
            return False
        return self.reach(one, other) and self.awake(one) and self.awake(other)

    def delay(self, *nodes: str) -> float:
        """How long a message travels."""
        spike = max([self.slow.get(node, 0.0) for node in nodes], default=0.0)
        return self.rng.uniform(0.001, 0.01) + (self.rng.uniform(0, spike) if spike else 0.0)

    def send(self, link: VirtualLink, sender: str, deliver: Callable[[], None]) -> None:
        """Have a message arrive at the other end, in order."""
        receiver = link.other(sender)
        if self._is_lost():
            self.reset(link)
            return
        now = self.loop.time()
        at = max(now + self.delay(sender, receiver), link.busy_until.get(receiver, 0.0))
        link.busy_until[receiver] = at
        self.loop.call_at(at, self._arrive, link, receiver, deliver)

    def _arrive(self, link: VirtualLink, receiver: str, deliver: Callable[[], None]) -> None:
        if receiver not in link.open:
            return
        stalled = link.stalled.get(receiver)
        if stalled or not self.awake(receiver) or not self.reach(*link.ends):
            self.stall(link, receiver, deliver)
            return
        deliver()

    def stall(self, link: VirtualLink, receiver: str, deliver: Callable[[], None]) -> None:
        """What is under way to one end arrives when that is possible."""
        link.stalled.setdefault(receiver, []).append(deliver)
        self._stalled[link] = None

    async def request(self, sender: VirtualNode, to: str, order: Struct, seconds: float | None) -> Struct:
        """A request over the link with a node, and its reply. Raises LinkClosed, TimeoutError, RemoteError."""
        link = sender.links.get(to)
        if link is None:
            raise LinkClosed("no link with that node at present")
        reply: asyncio.Future[Struct] = self.loop.create_future()
        link.waiting.setdefault(sender.id, {})[reply] = None

        def answer(outcome: Struct | RemoteError) -> None:
            if not reply.done():
                if isinstance(outcome, RemoteError):
                    reply.set_exception(outcome)
                else:
                    reply.set_result(outcome)

        def arrived() -> None:
            receiver = self.nodes.get(to)
            if receiver is not None:
                receiver.spawn(receiver.serve(link, sender.id, order, answer))

        self.send(link, sender.id, arrived)
        try:
            async with asyncio.timeout(seconds):
                return await reply
        finally:
            link.waiting.get(sender.id, {}).pop(reply, None)

    def connect(self, one: str, other: str) -> VirtualLink:
        """A dial succeeds: there is a link, over which both sides send their records (see `_greet`)."""
        here, there = self.nodes[one], self.nodes[other]
        for node, peer in ((here, other), (there, one)):
            if peer in node.links:
                self.close_end(node.links[peer], node.id, dial=False)
        self.unlinked.pop(frozenset((one, other)), None)
        self.links_made += 1
        link = VirtualLink((one, other), {one, other}, self.loop.time())
        here.on_linked(other, link)
        there.on_linked(one, link)
        return link

    def _greet(self, links: Sequence[VirtualLink]) -> None:
        """The first messages over new links, whose order with what follows is kept."""
        at = self.loop.time() + self.delay(*(end for link in links for end in link.ends))
        for link in links:
            link.busy_until = dict.fromkeys(link.ends, at)

        def arrive() -> None:
            for link in links:
                for sender, receiver in (link.ends, link.ends[::-1]):
                    if self._is_lost():
                        self.reset(link)
                    elif sender in self.nodes and receiver in self.nodes:
                        here, there = self.nodes[sender], self.nodes[receiver]
                        self._arrive(link, receiver, lambda h=here, t=there: t.receive(h.record))

        self.loop.call_at(at, arrive)

    def _is_lost(self) -> bool:
        """Whether chance has it that a message is lost."""
        lost = bool(self.loss) and self.rng.random() < self.loss
        self.lost_messages += lost
        return lost

    def reset(self, link: VirtualLink) -> None:
        """A link is lost; both ends that can know of it do."""
        for end in link.ends:
            self._hear_of_close(link, end)

    def close_end(self, link: VirtualLink, node: str, *, dial: bool = True) -> None:
        """A node closes its end, or hears that it is closed."""
        if node not in link.open:
            return
        link.open.discard(node)
        link.stalled.pop(node, None)
        for reply in link.waiting.pop(node, {}):
            if not reply.done():
                reply.set_exception(LinkClosed("the link was lost"))
        there = self.nodes.get(node)
        if there is not None:
            there.on_unlinked(link.other(node), link)
        other = link.other(node)
        if other in link.open:
            self._hear_of_close(link, other)
        if dial:
            self.lost(*link.ends)

    def _hear_of_close(self, link: VirtualLink, node: str) -> None:
        def close() -> None:
            if node not in link.open:
                return
            if self.awake(node) and self.reach(*link.ends):
                self.close_end(link, node)
            else:
                self.stall(link, node, close)

        if self.reach(*link.ends):
            self.loop.call_later(self.delay(*link.ends), close)
        else:
            self.stall(link, node, close)

    def lost(self, one: str, other: str) -> None:
        """Two nodes have no link any more: they dial each other, at once and then with back-off."""
        pair = frozenset((one, other))
        if pair not in self.unlinked:
            self.unlinked[pair] = self.loop.time()
            if self.reach(one, other):
                self.loop.call_later(self.rng.uniform(0.02, 0.1), self._dial, pair)

    def _dial(self, *pairs: Pair) -> None:
        made: list[VirtualLink] = []
        for pair in pairs:
            one, other = sorted(pair)
            if pair not in self.unlinked or not self.reach(one, other):
                continue
            for node, peer in ((one, other), (other, one)):
                if peer not in self.nodes and self.awake(node):
                    self.nodes[node].on_refused(peer)
            if self.awake(one) and self.awake(other):
                made.append(self.connect(one, other))
        if made:
            self._greet(made)

    def changed(self) -> None:
        """Paths or machines changed: what was stalled goes on, and dials succeed at their next try."""
        now = self.loop.time()
        waves: dict[float, list[Pair]] = {}
        for pair, since in self.unlinked.items():
            one, other = pair
            if self.awake(one) and self.awake(other) and self.reach(one, other):
                waves.setdefault(_next_try(since, now), []).append(pair)
        for at, pairs in waves.items():
            self.loop.call_at(at, self._dial, *pairs)
        stalled, self._stalled = self._stalled, {}
        for link in stalled:
            for end in link.ends if self.reach(*link.ends) else ():
                if self.awake(end):
                    self._release(link, end)
            if link.stalled:
                self._stalled[link] = None
        for hear in self.on_paths_changed:
            hear()

    def _release(self, link: VirtualLink, end: str) -> None:
        for deliver in link.stalled.pop(end, ()):
            self.loop.call_later(self.delay(), self._arrive, link, end, deliver)


def _next_try(since: float, now: float) -> float:
    """When a node that was lost at `since` is dialled next, in waves."""
    elapsed = now - since
    wait = next((after for after in BACKOFF if after > elapsed), elapsed + LAST_BACKOFF)
    return now + max(WAVE, round((wait - elapsed) / WAVE) * WAVE)
