"""The two halves of a link's book-keeping: what this side asked, and what it is answering."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from msgspec import Struct

from swarmd.transport.frames import Buffer, Flow, FrameError, payload_view
from swarmd.transport.messages import LinkClosed, RemoteError
from swarmd.transport.streams import RemoteStream, SendWindow, produce

log = logging.getLogger("swarmd.transport")

MAX_ANSWERING = 256
MAX_ANSWERING_BYTES = 256 * 1024 * 1024
MAX_UNREAD_BYTES = 128 * 1024 * 1024

Answer = Struct | tuple[Struct, Buffer]
Reply = tuple[Struct, bytearray]


class Asked:
    """Requests and streams that this side opened, by id.

    Answers to ids no longer known are late, not wrong; answers to ids that were never used are.
    """

    def __init__(self) -> None:
        self._last_id = 0
        self._requests: dict[int, asyncio.Future[Reply]] = {}
        self._streams: dict[int, RemoteStream] = {}

    def new_request(self) -> tuple[int, asyncio.Future[Reply]]:
        """An id and the future of its reply."""
        self._last_id += 1
        future = asyncio.get_running_loop().create_future()
        self._requests[self._last_id] = future
        return self._last_id, future

    def new_stream(self, stream: RemoteStream) -> int:
        """An id under which `stream` gets its items."""
        self._last_id += 1
        self._streams[self._last_id] = stream
        return self._last_id

    def forget(self, exchange_id: int) -> bool:
        """Stop waiting; whether the answer was still to come."""
        request = self._requests.pop(exchange_id, None)
        stream = self._streams.pop(exchange_id, None)
        return request is not None or stream is not None

    def check(self, exchange_id: int) -> None:
        """An answer came; `FrameError` if this side has never asked under that id."""
        if not 0 < exchange_id <= self._last_id:
            raise FrameError("it answers what was never asked")

    def reply(self, exchange_id: int, message: Struct, payload: bytearray) -> None:
        """A REPLY came."""
        future = self._requests.pop(exchange_id, None)
        if future is not None and not future.done():
            future.set_result((message, payload))

    def error(self, exchange_id: int, error: RemoteError) -> None:
        """An ERROR came: the end of a request or a stream."""
        future = self._requests.pop(exchange_id, None)
        if future is not None and not future.done():
            future.set_exception(error)
        self.end(exchange_id, error)

    def item(self, exchange_id: int, item: Struct) -> None:
        """A STREAM_ITEM came; `FrameError` if it is outside the window."""
        stream = self._streams.get(exchange_id)
        if stream is not None:
            stream.deliver(item)

    def end(self, exchange_id: int, error: Exception | None = None) -> None:
        """A STREAM_END came, or an ERROR for a stream."""
        stream = self._streams.pop(exchange_id, None)
        if stream is not None:
            stream.finish(error)

    def fail_all(self, reason: str) -> None:
        """The link is down: everybody who waits learns it."""
        requests, self._requests = self._requests, {}
        streams, self._streams = self._streams, {}
        for future in requests.values():
            if not future.done():
                future.set_exception(LinkClosed(reason))
        for stream in streams.values():
            stream.finish(LinkClosed(reason))


Send = Callable[[Flow, int, Struct, Buffer], Awaitable[None]]
SendItem = Callable[[int, Struct], Awaitable[None]]
Refuse = Callable[[int, RemoteError], None]
EndStream = Callable[[int], None]


class Answering:
    """What this side is answering: one task per request or stream, bounded in number and payload bytes."""

    def __init__(self, send: Send, send_item: SendItem, refuse: Refuse, end_stream: EndStream):
        self._send = send
        self._send_item = send_item
        self._refuse = refuse
        self._end_stream = end_stream
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._windows: dict[int, SendWindow] = {}
        self._bytes = 0
        self._unread = 0  # bytes of answers that are not handed to the network yet
        self._last_id = 0

    def request(self, exchange_id: int, size: int, answer: Callable[[], Awaitable[Answer]]) -> None:
        """Answer a request of `size` payload bytes with what `answer` returns."""

        async def work() -> None:
            result = await answer()
            message, payload = result if isinstance(result, tuple) else (result, b"")
            count = payload_view(payload).nbytes
            if self._unread and self._unread + count > MAX_UNREAD_BYTES:
                raise RemoteError("busy", "more is asked for on this link than is read; try again")
            self._unread += count
            try:
                await self._send(Flow.REPLY, exchange_id, message, payload)
            finally:
                self._unread -= count

        self._start(exchange_id, size, work)

    def stream(self, exchange_id: int, size: int, answer: Callable[[], AsyncIterator[Struct]]) -> None:
        """Answer with a stream of the messages that `answer` yields."""
        window = SendWindow()

        def send(item: Struct) -> Awaitable[None]:
            return self._send_item(exchange_id, item)

        async def work() -> None:
            await produce(answer(), window, send)
            self._end_stream(exchange_id)

        if self._start(exchange_id, size, work):
            self._windows[exchange_id] = window

    def grant(self, exchange_id: int, items: int) -> None:
        """A CREDIT came; `FrameError` if it is more than was taken."""
        window = self._windows.get(exchange_id)
        if window is not None:
            window.grant(items)

    def cancel(self, exchange_id: int) -> None:
        """A CANCEL came: nobody waits for this answer any more."""
        task = self._tasks.get(exchange_id)
        if task is not None:
            task.cancel()

    def running(self) -> set[asyncio.Task[None]]:
        """The tasks at work."""
        return set(self._tasks.values())

    def cancel_all(self) -> None:
        """The link is down. A task that is itself closing the link is let finish."""
        current = asyncio.current_task()
        for task in self._tasks.values():
            if task is not current:
                task.cancel()

    def _start(self, exchange_id: int, size: int, work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        if exchange_id <= self._last_id:
            raise FrameError("a request uses an id for the second time")
        self._last_id = exchange_id
        if len(self._tasks) >= MAX_ANSWERING or self._bytes + size > MAX_ANSWERING_BYTES:
            self._refuse(exchange_id, RemoteError("busy", "too many requests at once on this link; try again"))
            return False
        self._bytes += size
        task = asyncio.create_task(self._guard(exchange_id, work), name=f"link answer {exchange_id}")
        self._tasks[exchange_id] = task

        def done(_: asyncio.Task[None]) -> None:
            self._bytes -= size
            self._tasks.pop(exchange_id, None)
            self._windows.pop(exchange_id, None)

        task.add_done_callback(done)
        return True

    async def _guard(self, exchange_id: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a handler.

        Whatever it raises becomes an ERROR frame, and what it did not mean to raise a log entry.
        """
        try:
            await work()
        except RemoteError as error:
            self._refuse(exchange_id, error)
        except LinkClosed:
            return
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._refuse(exchange_id, RemoteError("internal", "the work was cancelled there"))
        except Exception:
            log.exception("a handler failed while answering a request")
            self._refuse(exchange_id, RemoteError("internal", "the request failed there; its log says why"))
