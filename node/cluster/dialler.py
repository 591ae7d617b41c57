"""Dialling other daemons: what the dial book says is due, all addresses of a node together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from swarmd.discovery.dial_book import Candidate, DialBook
from swarmd.transport.endpoint import Endpoint, LinkRefused
from swarmd.transport.link import Link
from swarmd.transport.log_limit import LogLimit

log = logging.getLogger("swarmd.cluster")

DIAL_SECONDS = 5.0
# How long an address may keep the next one waiting, as in RFC 8305 ("happy eyeballs").
STAGGER_SECONDS = 0.15
MAX_LAST_HOSTS = 1024

WHAT_TO_DO = (
    "to take part in another swarm, use `swarmd join TOKEN`; if it was a mistake, have `swarmd evict --undo` run where "
    "the swarm was founded"
)


class Dialler:
    """A thin pump around the dial book.

    `is_linked` tells whether a link with a node is up; `on_refused` hears of a node whose program has ended: where the
    last link with it led to, nobody listens any more.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        book: DialBook,
        is_linked: Callable[[str], bool],
        on_refused: Callable[[str, float], None],
    ) -> None:
        self._endpoint = endpoint
        self._book = book
        self._is_linked = is_linked
        self._on_refused = on_refused
        self._last_host: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._limit = LogLimit()

    def on_lost(self, link: Link, now: float) -> None:
        """The last link with a node is down: it is dialled again."""
        self._last_host.pop(link.peer_id, None)
        self._last_host[link.peer_id] = link.remote_address[0]
        while len(self._last_host) > MAX_LAST_HOSTS:
            del self._last_host[next(iter(self._last_host))]
        self._book.note_lost(link.peer_id, now)

    async def close(self) -> None:
        """Give up what is being dialled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def dial_due(self, now: float) -> None:
        """Start the dials that are due."""
        by_node: dict[str | None, list[Candidate]] = {}
        for candidate in self._book.due(now):
            by_node.setdefault(candidate.node_id, []).append(candidate)
        for static in by_node.pop(None, []):
            self._start_dial([static])
        for candidates in by_node.values():
            self._start_dial(candidates)

    def _start_dial(self, candidates: list[Candidate]) -> None:
        task = asyncio.create_task(self._race(candidates), name="dial")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _race(self, candidates: list[Candidate]) -> None:
        """Dial the addresses of one node, each a little after the one before, and keep the first that answers."""
        waiting, attempts, reason = deque(candidates), set[asyncio.Task[str]](), ""
        try:
            while waiting or attempts:
                if candidates[0].node_id is not None and self._is_linked(candidates[0].node_id):
                    waiting.clear()
                    if not attempts:
                        return
                if waiting:
                    attempts.add(asyncio.create_task(self._dial(waiting.popleft())))
                seconds = STAGGER_SECONDS if waiting else None
                done, attempts = await asyncio.wait(attempts, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                reasons = [attempt.result() for attempt in done]
                if "" in reasons:
                    return
                reason = reason or next(iter(reasons), "")
        finally:
            for attempt in attempts:
                attempt.cancel()
        self._log_unreachable(candidates, reason)

    async def _dial(self, candidate: Candidate) -> str:
        """Why there is no link, or nothing when there is one. Static peers' refusals are logged one by one."""
        try:
            link = await self._endpoint.dial(
                candidate.host,
                candidate.port,
                expect=candidate.node_id,
                timeout=DIAL_SECONDS,
                quiet=candidate.node_id is not None,
            )
        except LinkRefused as error:
            now = time.monotonic()
            self._book.note_failed(candidate.address, now, evicted=error.lasting)
            if error.evicted and self._limit.admit("evicted", now) is not None:
                log.error("a member says that this node was evicted (%s); %s", error.reason, WHAT_TO_DO)
            node = candidate.node_id
            if error.nobody_listens and node is not None and self._last_host.get(node) == candidate.host:
                self._on_refused(node, now)
            return error.reason
        self._book.note_linked(link.peer_id, candidate.address, time.monotonic())
        return ""

    def _log_unreachable(self, candidates: list[Candidate], reason: str) -> None:
        """One line for a node, however many addresses it has."""
        node_id = candidates[0].node_id
        if node_id is not None and self._limit.admit(f"{node_id} {reason}", time.monotonic()) is not None:
            log.info("node %s cannot be reached at any of its addresses: %s", node_id[:12], reason)
