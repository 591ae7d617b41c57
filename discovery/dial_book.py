"""Whom to dial next: the known addresses of nodes and peers, with back-off. Pure: the caller passes the time.

Everything that comes from mDNS or gossip can be invented by somebody, so the book is bounded: in nodes, in
addresses per node and in dials per second. Peers named by a person and nodes linked at present are never
forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from swarmd.discovery.peers import PeerAddress

MAX_NODES = 1024
MAX_ADDRESSES = 16
DIALS_PER_SECOND = 16.0
FORGET_SECONDS = 600.0
FIRST_BACKOFF = 0.5
LAST_BACKOFF = 30.0
# A dial that nobody reported back on is forgotten, or its address would never be tried again.
UNREPORTED_SECONDS = 30.0
# Who says that this node is evicted says so again; it need not be asked often, in case that is taken back.
EVICTED_BACKOFF = 300.0

Address = tuple[str, int]


class Candidate(NamedTuple):
    """A dial to make now: `node_id` is who must answer, None for a static peer of unknown identity."""

    host: str
    port: int
    node_id: str | None

    @property
    def address(self) -> Address:
        """The (host, port) to report back with `note_failed` or `note_linked`."""
        return self.host, self.port


@dataclass
class _Route:
    """One address: when it may be tried again, and what is known of it."""

    next_try: float
    heard: float
    backoff: float = FIRST_BACKOFF
    proven: bool = False  # a link has come about over it
    evicted: bool = False  # who answered there last refused this node for good


@dataclass
class _Node:
    heard: float
    linked: bool = False
    routes: dict[Address, _Route] = field(default_factory=dict)

    @property
    def proven(self) -> bool:
        return any(route.proven for route in self.routes.values())


class DialBook:
    """Collects hints and says which addresses are due.

    Every candidate that `due` returns must be answered with `note_linked` or `note_failed`.
    """

    def __init__(self, own_id: str, *, dials_per_second: float = DIALS_PER_SECOND):
        self._own_id = own_id
        self._rate = dials_per_second
        self._allowance = dials_per_second
        self._refilled: float | None = None
        self._nodes: dict[str, _Node] = {}
        self._static: dict[Address, _Route] = {}
        self._static_node: dict[Address, str] = {}  # who answered at a static peer's address last
        self._refused: frozenset[str] = frozenset()

    def note_static(self, peer: PeerAddress, now: float) -> None:
        """A peer named by a person: dialled for ever, whoever it is; its name is resolved at every dial."""
        self._static.setdefault((peer.host, peer.port), _Route(next_try=now, heard=now))

    def note_sighting(self, node_id: str, addresses: Iterable[Address], now: float) -> None:
        """A node was seen on the network just now: its addresses are worth a try at once, back-off or not."""
        self._note(node_id, addresses, now, eager=True)

    def note_gossip(self, node_id: str, addresses: Iterable[Address], now: float) -> None:
        """A member told of a node: its addresses are tried, without cutting a back-off short."""
        self._note(node_id, addresses, now, eager=False)

    def note_failed(self, address: Address, now: float, *, evicted: bool = False) -> None:
        """A dial led to no link; the address waits, twice as long every time, 30 s at most.

        `evicted`: whoever answered says that this node is; then it waits for five minutes, also if it is seen again.
        """
        for route in self._routes_at(address):
            route.next_try = now + (EVICTED_BACKOFF if evicted else route.backoff)
            route.backoff = min(2 * route.backoff, LAST_BACKOFF)
            route.evicted = evicted

    def refuse(self, nodes: Iterable[str]) -> None:
        """These nodes, and no others, are not dialled, whatever is heard of them."""
        self._refused = frozenset(nodes)

    def note_linked(self, node_id: str, address: Address | None, now: float) -> None:
        """A link to a node is up; `address` is the one that was dialled, None if the other side dialled."""
        node = self._nodes.get(node_id)
        if node is None:
            node = self._nodes[node_id] = _Node(heard=now)
            self._make_room()
        node.linked, node.heard = True, now
        if address is None:
            return
        if address in self._static:
            self._static_node[address] = node_id
        for route in self._routes_at(address):
            route.backoff, route.next_try = FIRST_BACKOFF, now
            route.proven = route.proven or address in node.routes
            route.evicted = False

    def note_lost(self, node_id: str, now: float) -> None:
        """The last link to a node is down: it is dialled again at once, then with back-off."""
        node = self._nodes.get(node_id)
        if node is None:
            return
        node.linked, node.heard = False, now
        for address, route in (*node.routes.items(), *self._static.items()):
            if address in node.routes or self._static_node.get(address) == node_id:
                route.backoff, route.next_try = FIRST_BACKOFF, now

    def due(self, now: float) -> list[Candidate]:
        """The dials to make now, all addresses of a node together, static peers first; bounded per second."""
        self._forget(now)
        self._refill(now)
        candidates: list[Candidate] = []
        for candidate, route in self._waiting():
            if self._allowance < 1:
                break
            if route.next_try <= now:
                self._allowance -= 1
                route.next_try = now + UNREPORTED_SECONDS
                candidates.append(candidate)
        return candidates

    def _waiting(self) -> Iterable[tuple[Candidate, _Route]]:
        linked = {node_id for node_id, node in self._nodes.items() if node.linked}
        for address, route in self._static.items():
            if self._static_node.get(address) not in linked:
                yield Candidate(*address, None), route
        # Proven and recently heard nodes first, so that invented ones cannot use up the allowance.
        ordered = sorted(self._nodes.items(), key=lambda item: (not item[1].proven, -item[1].heard))
        for node_id, node in ordered:
            if not node.linked and node_id not in self._refused:
                for address, route in node.routes.items():
                    yield Candidate(*address, node_id), route

    def _note(self, node_id: str, addresses: Iterable[Address], now: float, *, eager: bool) -> None:
        if node_id == self._own_id:
            return
        node = self._nodes.get(node_id)
        if node is None:
            node = self._nodes[node_id] = _Node(heard=now)
            self._make_room()
        node.heard = now
        for address in list(addresses)[:MAX_ADDRESSES]:
            route = node.routes.setdefault(address, _Route(next_try=now, heard=now))
            route.heard = now
            if eager and not route.evicted and route.next_try > now and route.backoff > FIRST_BACKOFF:
                route.next_try, route.backoff = now, FIRST_BACKOFF
        while len(node.routes) > MAX_ADDRESSES:
            del node.routes[min(node.routes, key=lambda key: _worth(node.routes[key]))]

    def _routes_at(self, address: Address) -> list[_Route]:
        routes = [node.routes[address] for node in self._nodes.values() if address in node.routes]
        if address in self._static:
            routes.append(self._static[address])
        return routes

    def _make_room(self) -> None:
        """Drop the least credible node beyond the bound: never linked first, then longest unheard."""
        if len(self._nodes) > MAX_NODES:
            idle = [node_id for node_id, node in self._nodes.items() if not node.linked]
            if idle:
                del self._nodes[min(idle, key=lambda key: (self._nodes[key].proven, self._nodes[key].heard))]

    def _forget(self, now: float) -> None:
        stale = [
            node_id for node_id, node in self._nodes.items() if not node.linked and now - node.heard > FORGET_SECONDS
        ]
        for node_id in stale:
            del self._nodes[node_id]

    def _refill(self, now: float) -> None:
        if self._refilled is not None:
            self._allowance = min(self._rate, self._allowance + (now - self._refilled) * self._rate)
        self._refilled = now


def _worth(route: _Route) -> tuple[bool, float]:
    return route.proven, route.heard
