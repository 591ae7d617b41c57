"""The receiving side of a link: frames out of the socket and into their handlers, without a change of tasks."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable

from msgspec import Struct

from swarmd.transport.frames import Frame, FrameDecoder
from swarmd.transport.messages import LinkClosed
from swarmd.transport.tls_socket import TlsSocket

log = logging.getLogger("swarmd.transport")

Unfinished = tuple[Struct, Awaitable[None]]
"""A message whose handler takes its time, and what to await for it."""


class Receiver:
    """Reads frames and gives them to `dispatch`, most of them straight from the loop's callback.

    What `dispatch` leaves unfinished is awaited before the next frame is read: so a slow handler slows the sender.
    """

    def __init__(self, sock: TlsSocket, decoder: FrameDecoder, dispatch: Callable[[Frame], Unfinished | None]) -> None:
        self._sock = sock
        self._decoder = decoder
        self._dispatch = dispatch
        self.received = 0  # bytes, so far
        self._unfinished: Unfinished | None = None
        self._ended = False

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun and is not complete."""
        return self._decoder.in_frame

    async def run(self) -> None:
        """Receive until the other side ends the stream. Raises `OSError`, and what `dispatch` raises."""
        try:
            while not self._ended:
                if not self._drain():
                    await self._sock.readable(self._drain)
                if self._unfinished is not None:
                    await self._finish(*self._unfinished)
                else:
                    await asyncio.sleep(0)
        finally:
            if self._unfinished is not None and inspect.iscoroutine(self._unfinished[1]):
                self._unfinished[1].close()

    def _drain(self) -> bool:
        """Read and dispatch what is there. True: `run` is to go on, because a handler is not finished, the loop is owed
        a turn, or the stream has ended.
        """
        decoder, sock = self._decoder, self._sock
        while True:
            while (frame := decoder.next_frame()) is not None:
                self._unfinished = self._dispatch(frame)
                if self._unfinished is not None:
                    return True
            count = sock.recv_now(decoder.buffer())
            if count is None:
                return False
            if count == 0:
                self._ended = True
                return True
            self.received += count
            decoder.advance(count)
            if sock.charge(count):
                return True

    async def _finish(self, message: Struct, waiting: Awaitable[None]) -> None:
        self._unfinished = None
        try:
            await waiting
        except LinkClosed:
            return
        except Exception:
            log.exception("a handler failed on a %s", type(message).__name__)
