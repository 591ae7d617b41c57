"""The sending side of a link: whole frames, in order, with the socket's back-pressure."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from swarmd.transport.frames import Envelope, encode_head
from swarmd.transport.tls_socket import TlsSocket

# Below this a payload is copied behind its header: one TLS record, one system call.
_INLINE_BYTES = 16 * 1024
_MAX_POSTED = 1024


class _Parcel(NamedTuple):
    parts: tuple[bytes | memoryview, ...]
    owned: bool  # the bytes are a copy of ours: the frame can be finished after its sender is gone
    sent: asyncio.Future[None] | None  # None: nobody waits


class Outbox:
    """Sends frames one after the other.

    A small frame on an idle link goes out within the call. Otherwise the sender waits until its frame has
    been handed to the network, behind the frames that came before. When a sender is cancelled, a frame not
    yet begun is withdrawn; a small one that has begun is finished in the background; a large one, whose
    memory the sender may use again, can only be broken off, so `fail` is called and the link ends.
    """

    def __init__(self, sock: TlsSocket, fail: Callable[[str], None]):
        self._sock = sock
        self._fail = fail
        self._queue: deque[_Parcel] = deque()
        self._current: _Parcel | None = None
        self._pump: asyncio.Task[None] | None = None

    async def put(self, envelope: Envelope, payload: memoryview) -> None:
        """Send a frame. Raises `FrameError` if it is too large, `OSError` if the connection is down.

        `payload` must stay unchanged until the call is over.
        """
        head = encode_head(envelope, payload.nbytes)
        owned = payload.nbytes <= _INLINE_BYTES
        parts = (head + payload,) if owned else (head, payload)
        if self._pump is None and owned:
            count = self._sock.send_now(parts[0])
            if count == len(parts[0]):
                await self._sock.breathe(count)
                return
            parts = (memoryview(parts[0])[count:],)
        sent = asyncio.get_running_loop().create_future()
        parcel = _Parcel(parts, owned, sent)
        self._enqueue(parcel)
        try:
            await sent
        except asyncio.CancelledError:
            if parcel in self._queue:
                self._queue.remove(parcel)
            elif parcel is self._current and not parcel.owned:
                self._fail("a large frame was cancelled while it was being sent")
            raise

    def post(self, envelope: Envelope) -> None:
        """Send a small frame without payload and without waiting: for answers of the link itself.

        Never raises for a connection that is down. A peer that makes us post more than it reads loses the
        link.
        """
        if self._sock.closed:
            return
        if len(self._queue) >= _MAX_POSTED:
            self._fail("the other side asks more than it reads")
            return
        data = memoryview(encode_head(envelope, 0))
        try:
            count = self._sock.send_now(data) if self._pump is None else 0
        except OSError as error:
            self._fail(f"sending failed: {error.strerror or error}")
            return
        if count < len(data):
            self._enqueue(_Parcel((data[count:],), True, None))

    def _enqueue(self, parcel: _Parcel) -> None:
        if self._pump is None:
            self._current = parcel
            self._pump = asyncio.create_task(self._run(parcel), name="link outbox")
        else:
            self._queue.append(parcel)

    async def _run(self, parcel: _Parcel) -> None:
        try:
            while True:
                self._current = parcel
                for part in parcel.parts:
                    await self._sock.send_all(part)
                if parcel.sent is not None and not parcel.sent.done():
                    parcel.sent.set_result(None)
                if not self._queue:
                    break
                parcel = self._queue.popleft()
        except OSError as error:
            self._break(parcel, error)
        finally:
            self._current = None
            self._pump = None

    def _break(self, parcel: _Parcel, error: OSError) -> None:
        for waiting in (parcel, *self._queue):
            if waiting.sent is not None and not waiting.sent.done():
                waiting.sent.set_exception(error)
        self._queue.clear()
        self._fail(f"sending failed: {error.strerror or error}")
