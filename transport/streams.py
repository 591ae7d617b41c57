"""Streams of messages within a link; a window keeps what a slow reader has not taken bounded."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from msgspec import Struct

from swarmd.transport.frames import Buffer, FrameError
from swarmd.transport.messages import LinkClosed

# Items that may be on their way without having been taken by the reader.
STREAM_WINDOW = 256


class StreamOpener(Protocol):
    """What a stream needs of its link."""

    async def open_stream(self, stream: RemoteStream, message: Struct, payload: Buffer) -> int:
        """Send the request; the stream's id."""
        ...

    def grant(self, stream_id: int, items: int) -> None:
        """Let the other side send so many more items."""

    def abandon_stream(self, stream_id: int) -> None:
        """Say that nobody reads the stream any more."""


class RemoteStream:
    """A stream that the other side produces: an async context manager and an async iterator of messages.

    Iteration raises what ended the stream: `RemoteError` if the other side refused or failed, `LinkClosed` if
    the link went down; items that arrived before are given out first. Leaving the context early cancels the
    stream there. One task reads a stream; a read that was cancelled loses nothing.
    """

    def __init__(self, link: StreamOpener, message: Struct, payload: Buffer):
        self._link = link
        self._request = (message, payload)
        self._id = 0
        self._items: deque[Struct] = deque()
        self._taken = 0
        self._ended = False
        self._error: Exception | None = None
        self._arrival: asyncio.Future[None] | None = None

    async def __aenter__(self) -> RemoteStream:
        self._id = await self._link.open_stream(self, *self._request)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if not self._ended:
            self._link.abandon_stream(self._id)

    def __aiter__(self) -> RemoteStream:
        return self

    async def __anext__(self) -> Struct:
        if self._taken >= STREAM_WINDOW // 2 and not self._ended:
            granted, self._taken = self._taken, 0
            self._link.grant(self._id, granted)
        while not self._items:
            if self._ended:
                raise self._error or StopAsyncIteration
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        self._taken += 1
        return self._items.popleft()

    def arrived(self) -> list[Struct]:
        """Take the items that are here already, without waiting; perhaps none."""
        items = list(self._items)
        self._items.clear()
        self._taken += len(items)
        return items

    def abandon(self, reason: str) -> None:
        """Cancel the stream there, and end it here with `LinkClosed`: who reads it waits no longer."""
        if not self._ended:
            self._link.abandon_stream(self._id)
            self.finish(LinkClosed(reason))

    def deliver(self, item: Struct) -> None:
        """Take an item from the receive loop; `FrameError` if the other side ignores the window."""
        if len(self._items) + self._taken >= STREAM_WINDOW:
            raise FrameError("a stream sent more items than its window allows")
        self._items.append(item)
        self._wake()

    def finish(self, error: Exception | None) -> None:
        """End the stream, with `error` if it did not end well. Later calls change nothing."""
        if not self._ended:
            self._ended, self._error = True, error
            self._wake()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)


class SendWindow:
    """How many more items the producing side of a stream may send."""

    def __init__(self) -> None:
        self._left = STREAM_WINDOW
        self._opened: asyncio.Future[None] | None = None

    async def take(self) -> None:
        """Use one place, waiting for the reader if there is none."""
        while self._left == 0:
            self._opened = asyncio.get_running_loop().create_future()
            await self._opened
        self._left -= 1

    def grant(self, items: int) -> None:
        """Places that the reader gives back; `FrameError` if there never were so many."""
        if not 0 < items <= STREAM_WINDOW - self._left:
            raise FrameError("a stream's reader gives back more than it was sent")
        self._left += items
        if self._opened is not None and not self._opened.done():
            self._opened.set_result(None)


async def produce(items: AsyncIterator[Struct], window: SendWindow, send: Callable[[Struct], Awaitable[None]]) -> None:
    """Send every message of an async iterator through a window, and close the iterator whatever happens."""
    try:
        async for item in items:
            await window.take()
            await send(item)
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()
