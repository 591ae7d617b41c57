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
_NOTHING = memoryview(b"")


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
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._current: _Parcel | None = None
        self._pump: asyncio.Task[None] | None = None

    async def put(self, envelope: Envelope, payload: memoryview) -> None:
        """Send a frame. Raises `FrameError` if it is too large, `OSError` if the connection is down.

        `payload` must stay unchanged until the call is over.
        """
        parcel = self._begin(envelope, payload, asyncio.get_running_loop().create_future)
        if parcel is None:
            await self._sock.breathe(len(payload))
            return
        assert parcel.sent is not None
        try:
            await parcel.sent
        except asyncio.CancelledError:
            if parcel in self._queue:
                self._queue.remove(parcel)
            elif parcel is self._current and not parcel.owned:
                self._fail("a large frame was cancelled while it was being sent")
            raise

    def post(self, envelope: Envelope, payload: memoryview = _NOTHING) -> None:
        """Send a frame without waiting; `payload` must stay unchanged for good. Raises `FrameError` if it is too large.

        Never raises for a connection that is down. Who posts more than the other side reads loses the link.
        """
        if self._sock.closed:
            return
        if len(self._queue) >= _MAX_POSTED:
            self._fail("the other side asks more than it reads")
            return
        try:
            self._begin(envelope, payload)
        except OSError as error:
            self._fail(f"sending failed: {error.strerror or error}")

    def gather(self, envelope: Envelope) -> bool:
        """Send a small frame together with others that come in the same turn of the loop, in one TLS record.

        False, and nothing done, when the network is behind: then wait with `put`. Raises `FrameError` if it is too
        large.
        """
        if self._pump is not None:
            return False
        frame = encode_head(envelope, 0)
        if not self._gathered:
            asyncio.get_running_loop().call_soon(self._send_gathered)
        self._gathered.append(frame)
        self._gathered_bytes += len(frame)
        if self._gathered_bytes > _INLINE_BYTES:
            self._send_gathered()
        return True

    def _send_gathered(self) -> None:
        frames, self._gathered, self._gathered_bytes = self._gathered, [], 0
        if frames and not self._sock.closed:
            try:
                self._send(_Parcel((b"".join(frames),), True, None))
            except OSError as error:
                self._fail(f"sending failed: {error.strerror or error}")

    def _begin(
        self, envelope: Envelope, payload: memoryview, new_future: Callable[[], asyncio.Future[None]] | None = None
    ) -> _Parcel | None:
        """Send a frame within the call if that is possible: None. Otherwise it is queued as the parcel returned."""
        head = encode_head(envelope, payload.nbytes)
        if self._gathered:
            self._send_gathered()
        owned = payload.nbytes <= _INLINE_BYTES
        parts = (b"".join((head, payload)),) if owned else (head, payload)
        return self._send(_Parcel(parts, owned, None), new_future)

    def _send(self, parcel: _Parcel, new_future: Callable[[], asyncio.Future[None]] | None = None) -> _Parcel | None:
        if self._pump is None and parcel.owned:
            data = parcel.parts[0]
            count = self._sock.send_now(data)
            if count == len(data):
                return None
            parcel = parcel._replace(parts=(memoryview(data)[count:],))
        if new_future is not None:
            parcel = parcel._replace(sent=new_future())
        if self._pump is None:
            self._current = parcel
            self._pump = asyncio.create_task(self._run(parcel), name="link outbox")
        else:
            self._queue.append(parcel)
        return parcel

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
