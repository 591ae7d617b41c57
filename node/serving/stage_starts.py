"""Stage processes from their start until they get a job; one is kept ready, so that a lost stage is soon back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from msgspec import Struct

from swarmd.node.serving.messages import TrustChanged
from swarmd.transport.link import Link, LinkClosed, RemoteError

log = logging.getLogger("swarmd.stages")

# The stage that was just started has its first steps before it: a spare takes a core for half a second or more.
SPARE_DELAY_SECONDS = 2.0
# One that was started just before it is needed presents itself in a moment, sooner than another would.
SPARE_ARRIVAL_SECONDS = 2.0
# Beats come twice a second.
SPARE_SILENCE_SECONDS = 1.5

Launch = Callable[[str, str], Awaitable[asyncio.subprocess.Process]]
"""(ticket, the device that it is to be ready for or empty): starts a process that dials in and shows the ticket."""


@dataclass(eq=False)
class Started:
    """A process that was started. `up` is its link, once it has presented itself; `heard` is when it last spoke."""

    ticket: str
    process: asyncio.subprocess.Process
    up: asyncio.Future[Link]
    heard: float = 0.0


class StageStarts:
    """Starts stage processes. With `keeps_spare` one more waits for its job, with everything imported that takes long
    to import (it holds no model: some 50 MB, more where torch computes). `clock` gives seconds.
    """

    def __init__(self, launch: Launch, clock: Callable[[], float], *, keeps_spare: bool) -> None:
        self._launch = launch
        self._clock = clock
        self._keeps_spare = keeps_spare
        self._by_ticket: dict[str, Started] = {}
        self._by_link: dict[Link, Started] = {}
        self._spare: Started | None = None
        self._refill: asyncio.Task[None] | None = None

    async def take(self) -> Started:
        """A process for a job: the spare one if it is there and lives, else a new one. Raises OSError."""
        spare, self._spare = self._spare, None
        if spare is not None:
            if not spare.up.done():
                try:
                    await asyncio.wait({spare.up}, timeout=SPARE_ARRIVAL_SECONDS)
                except asyncio.CancelledError:
                    spare.process.kill()  # nobody else knows of it
                    raise
            if self._is_well(spare):
                return spare
            await self._end(spare)
        return await self._start("")

    def refill(self, device: str) -> None:
        """Before long, have another spare, ready for stages on this device."""
        if self._keeps_spare and self._spare is None and (self._refill is None or self._refill.done()):
            self._refill = asyncio.create_task(self._start_spare(device), name="start of a spare stage process")

    def forget(self, started: Started, reason: str) -> None:
        """Its process has ended."""
        self._by_ticket.pop(started.ticket, None)
        if not started.up.done():
            started.up.set_exception(RemoteError("spawn_failed", reason))
            started.up.exception()

    def on_link(self, link: Link) -> bool:
        """A process with this node's own key presents itself; False when it holds no ticket of ours."""
        started = self._by_ticket.pop(link.peer.note, None)
        if started is None or started.up.done():
            return False
        self._by_link[link] = started
        started.heard = self._clock()
        started.up.set_result(link)
        with contextlib.suppress(LinkClosed):
            link.send_soon(TrustChanged())  # in case that it read the data dir just before a change
        return True

    def on_message(self, link: Link) -> None:
        """It lives."""
        if (started := self._by_link.get(link)) is not None:
            started.heard = self._clock()

    def on_closed(self, link: Link) -> None:
        """Its link is down."""
        self._by_link.pop(link, None)

    def tell(self, message: Struct) -> None:
        """A message to every process, also the spare one; one whose link is down is missed."""
        for link in self._by_link:
            with contextlib.suppress(LinkClosed):
                link.send_soon(message)

    async def close(self) -> None:
        """End the spare process."""
        self._keeps_spare = False
        if self._refill is not None:
            self._refill.cancel()
            await asyncio.wait({self._refill})
        if self._spare is not None:
            await self._end(self._spare)

    async def _start(self, device: str) -> Started:
        ticket = secrets.token_hex(8)
        process = await self._launch(ticket, device)
        started = Started(ticket, process, asyncio.get_running_loop().create_future())
        self._by_ticket[ticket] = started
        return started

    async def _start_spare(self, device: str) -> None:
        await asyncio.sleep(SPARE_DELAY_SECONDS)
        try:
            self._spare = await self._start(device)
        except OSError as error:
            log.warning("no spare stage process can be started: %s", error)

    def _is_well(self, spare: Started) -> bool:
        if spare.process.returncode is not None or not spare.up.done() or spare.up.result() not in self._by_link:
            return False
        return self._clock() - spare.heard <= SPARE_SILENCE_SECONDS

    async def _end(self, spare: Started) -> None:
        """It holds nothing, so it need not be asked to end."""
        if spare.process.returncode is None:
            spare.process.kill()
        self.forget(spare, "it was not needed")
        await spare.process.wait()
