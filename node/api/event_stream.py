"""A response of server-sent events: signs of life while there is nothing to say, and an end for who does not read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web


@dataclass(frozen=True)
class StreamLimits:
    """In seconds: how long a client may leave unread what fills its connection; the silence before a comment."""

    unread: float = 60.0
    quiet: float = 3.0


LIMITS: web.AppKey[StreamLimits] = web.AppKey("stream_limits", StreamLimits)

COMMENT = b": the swarm is at work\n\n"
"""Clients skip lines that begin with a colon (WHATWG HTML, 9.2.6); proxies see that the connection lives."""


class EventStream:
    """Writes the events of one response. The headers go out with the first of them.

    Whoever does not read for `unread` seconds loses the connection, so that what is made for it is not held for ever:
    writes raise ConnectionResetError then.
    """

    def __init__(self, request: web.Request) -> None:
        self.response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        self._request = request
        self._limits = request.app[LIMITS]
        self._loop = asyncio.get_running_loop()
        self._sent_at = 0.0
        # Events and comments come from two tasks.
        self._turn = asyncio.Lock()

    @property
    def begun(self) -> bool:
        """Whether the headers went out."""
        return self.response.prepared

    async def write(self, events: bytes) -> None:
        """Send events."""
        async with self._turn:
            if not self.begun:
                await self._within(self.response.prepare(self._request))
            await self._within(self.response.write(events))
            self._sent_at = self._loop.time()

    async def end(self, events: bytes) -> None:
        """Send the last events."""
        async with self._turn:
            await self._within(self.response.write_eof(events))

    @asynccontextmanager
    async def commented(self) -> AsyncGenerator[None]:
        """While in here, comments fill the silence of a stream that has begun."""
        comments = asyncio.create_task(self._comment())
        try:
            yield
        finally:
            comments.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await comments

    async def _comment(self) -> None:
        while True:
            quiet = self._loop.time() - self._sent_at if self.begun else 0.0
            if quiet >= self._limits.quiet:
                await self.write(COMMENT)
                quiet = 0.0
            await asyncio.sleep(self._limits.quiet - quiet)

    async def _within(self, write: Awaitable[object]) -> None:
        try:
            async with asyncio.timeout(self._limits.unread):
                await write
        except TimeoutError:
            # The server cancels the handler of a connection that is lost, which cancels the generation.
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client does not read its answer") from None
