"""A link: an authenticated, encrypted connection of two processes with messages, requests and streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import msgspec
from msgspec import Struct

from swarmd.transport.exchanges import Answering, Asked, Reply
from swarmd.transport.frames import Buffer, Envelope, Flow, Frame, FrameError, payload_view
from swarmd.transport.handler import LinkHandler
from swarmd.transport.handshake import Introduction
from swarmd.transport.messages import (
    EMPTY,
    PROTOCOL_VERSION,
    ErrorBody,
    Hello,
    LinkClosed,
    RemoteError,
    Role,
    Vocabulary,
    decode_body,
    encode_body,
    one_line,
)
from swarmd.transport.outbox import Outbox
from swarmd.transport.streams import RemoteStream
from swarmd.transport.tls_socket import TlsSocket

__all__ = [
    "PROTOCOL_VERSION",
    "Hello",
    "Link",
    "LinkClosed",
    "LinkHandler",
    "RemoteError",
    "RemoteStream",
    "Role",
    "Vocabulary",
]

log = logging.getLogger("swarmd.transport")

_CLOSE_SECONDS = 1.0


class Link:
    """One end of a link. Made by an `Endpoint`.

    Messages and requests of one link arrive in the order in which they were sent. Payloads are at most 64 MiB
    and are not copied on the way out: they must stay unchanged until the call returns. A large payload holds
    up what is sent after it, so bulk belongs on a second link.
    """

    def __init__(
        self,
        sock: TlsSocket,
        introduction: Introduction,
        vocabulary: Vocabulary,
        handler: LinkHandler,
        *,
        initiator: bool,
        on_breach: Callable[[Link, FrameError], None],
    ):
        """`on_breach` hears of a breach of the protocol, which ends the link."""
        self.peer_id = introduction.peer_id
        self.peer = introduction.peer
        self.initiator = initiator
        self.remote_address = sock.remote_address
        self.local_address = sock.local_address
        self.close_reason = ""
        self._decoder = introduction.decoder
        self._sock = sock
        self._vocabulary = vocabulary
        self._handler = handler
        self._on_breach = on_breach
        self._outbox = Outbox(sock, self._break)
        self._asked = Asked()
        self._answering = Answering(self._put_message, self._post_error, self._post_end)
        self._telling = False  # `on_closed` is due or running
        self._finished = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._flows: dict[Flow, Callable[[Frame], None]] = {
            Flow.REQUEST: self._on_request,
            Flow.REPLY: self._on_reply,
            Flow.ERROR: self._on_error,
            Flow.STREAM: self._on_stream,
            Flow.STREAM_ITEM: self._on_item,
            Flow.STREAM_END: lambda frame: self._asked.end(frame.envelope.id),
            Flow.CANCEL: lambda frame: self._answering.cancel(frame.envelope.id),
            Flow.CREDIT: self._on_credit,
            Flow.GOODBYE: self._on_goodbye,
        }

    def __repr__(self) -> str:
        return f"Link({self.peer.role} {self.peer.name!r} {self.peer_id[:12]} at {self.remote_address})"

    @property
    def closed(self) -> bool:
        """Whether the link is down or going down; `close_reason` then says why."""
        return bool(self.close_reason)

    async def start(self) -> None:
        """Begin to receive; returns when the handler's `on_link` has. Called once, by the endpoint.

        Raises what `on_link` raised.
        """
        ready = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(ready), name=f"link {self.peer_id[:12]}")
        try:
            await ready
        except asyncio.CancelledError:
            self._break("nobody waits for this link any more")
            raise

    async def send(self, message: Struct, payload: Buffer = b"") -> None:
        """Send a one-way message; waits for the network's back-pressure, not for the other side.

        Raises `LinkClosed`, `FrameError` if it is too large, `TypeError` if it is not in the vocabulary.
        """
        await self._put_message(Flow.ONEWAY, 0, message, payload)

    async def request(self, message: Struct, payload: Buffer = b"", *, timeout: float | None = 30) -> Reply:
        """Ask and wait for the answer: (message, payload).

        Raises `RemoteError` if the other side refuses, `LinkClosed`, and `TimeoutError` after `timeout`
        seconds; giving up in either way cancels the work there.
        """
        self._check_open()
        exchange_id, future = self._asked.new_request()
        try:
            async with asyncio.timeout(timeout):
                await self._put_message(Flow.REQUEST, exchange_id, message, payload)
                return await future
        except TimeoutError:
            raise TimeoutError(f"{self.peer.name} did not answer {type(message).__name__} within {timeout} s") from None
        finally:
            if self._asked.forget(exchange_id):
                self._post(Flow.CANCEL, exchange_id)
            if not future.cancel() and not future.cancelled():
                future.exception()  # looked at, so that asyncio does not report it as lost

    def stream(self, message: Struct, payload: Buffer = b"") -> RemoteStream:
        """Ask for a stream: ``async with link.stream(m) as items: async for item in items``."""
        return RemoteStream(self, message, payload)

    async def close(self, reason: str) -> None:
        """Say goodbye with `reason` as far as possible within a second, and close. Idempotent.

        Called by a handler of this very link it returns when the goodbye is out, otherwise when `on_closed`
        has run.
        """
        if not self.closed:
            goodbye = Envelope(Flow.GOODBYE, 0, encode_body(one_line(reason)))
            self._abandon(reason)
            with contextlib.suppress(OSError):  # TimeoutError is one
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._outbox.put(goodbye, memoryview(b""))
            self._sock.end_sending()
            asyncio.get_running_loop().call_later(_CLOSE_SECONDS, self._give_up)
        current = asyncio.current_task()
        if current is not self._task and current not in self._answering.running():
            await self.wait_closed()

    async def wait_closed(self) -> None:
        """Wait until the link is down and `on_closed` has run."""
        await self._finished.wait()

    async def open_stream(self, stream: RemoteStream, message: Struct, payload: Buffer) -> int:
        """Send a stream's request; for `RemoteStream`."""
        self._check_open()
        exchange_id = self._asked.new_stream(stream)
        try:
            await self._put_message(Flow.STREAM, exchange_id, message, payload)
        except BaseException:
            self.abandon_stream(exchange_id)
            raise
        return exchange_id

    def grant(self, stream_id: int, items: int) -> None:
        """Open a stream's window by `items`; for `RemoteStream`."""
        self._post(Flow.CREDIT, stream_id, encode_body(items))

    def abandon_stream(self, stream_id: int) -> None:
        """Cancel a stream on the other side; for `RemoteStream`."""
        if self._asked.forget(stream_id):
            self._post(Flow.CANCEL, stream_id)

    async def _put_message(self, flow: Flow, exchange_id: int, message: Struct, payload: Buffer) -> None:
        envelope = Envelope(flow, exchange_id, self._vocabulary.encode(message))
        view = payload_view(payload)
        self._check_open()
        try:
            await self._outbox.put(envelope, view)
        except OSError as error:
            self._break(f"sending failed: {error.strerror or error}")
            raise LinkClosed(self.close_reason) from error

    def _post(self, flow: Flow, exchange_id: int, body: msgspec.Raw = EMPTY) -> None:
        if not self.closed:
            self._outbox.post(Envelope(flow, exchange_id, body))

    def _post_error(self, exchange_id: int, error: RemoteError) -> None:
        self._post(Flow.ERROR, exchange_id, encode_body(ErrorBody(error.code[:64], one_line(error.message, 4096))))

    def _post_end(self, exchange_id: int) -> None:
        self._post(Flow.STREAM_END, exchange_id)

    def _check_open(self) -> None:
        if self.closed:
            raise LinkClosed(self.close_reason)

    def _abandon(self, reason: str) -> None:
        """Mark the link as going down and tell everybody who waits; the first reason stays."""
        if not self.closed:
            self.close_reason = reason
            self._asked.fail_all(reason)
            self._answering.cancel_all()

    def _break(self, reason: str) -> None:
        """The connection cannot be used any more."""
        self._abandon(reason)
        self._sock.close()

    async def _run(self, ready: asyncio.Future[None]) -> None:
        try:
            await self._handler.on_link(self)
            log.debug("link with %s %s (%s) is up", self.peer.role, self.peer.name, self.peer_id[:12])
            if not ready.done():
                ready.set_result(None)
            await self._receive()
        except Exception as error:
            self._break("this side failed to serve the link")
            if ready.done():
                log.exception("serving a link failed")
            else:
                ready.set_exception(error)
        finally:
            self._break("this side is shutting down")
            await self._tell_closed()

    def _give_up(self) -> None:
        """The grace after a goodbye is over: a handler that still holds the receive loop is cancelled."""
        self._sock.close()
        if self._task is not None and not self._telling:
            self._task.cancel()

    async def _tell_closed(self) -> None:
        self._telling = True
        try:
            if running := self._answering.running():
                await asyncio.wait(running, timeout=_CLOSE_SECONDS)
            log.debug("link with %s %s closed: %s", self.peer.role, self.peer.name, self.close_reason)
            await self._handler.on_closed(self, self.close_reason)
        except Exception:
            log.exception("a handler failed while a link was closing")
        finally:
            self._finished.set()

    async def _receive(self) -> None:
        """Read and dispatch until the link is down; leaves it broken with a reason."""
        try:
            while not self._sock.closed:
                frame = self._decoder.next_frame()
                if frame is not None:
                    await self._dispatch(frame)
                elif count := await self._sock.recv_into(self._decoder.buffer()):
                    self._decoder.advance(count)
                else:
                    middle = "in the middle of a frame" if self._decoder.in_frame else "without a goodbye"
                    self._break(f"the other side closed the connection {middle}")
        except FrameError as error:
            self._on_breach(self, error)
            self._post(Flow.GOODBYE, 0, encode_body(one_line(str(error))))
            self._break(f"protocol error: {error}")
        except OSError as error:
            self._break(f"the connection failed: {error.strerror or error}")

    async def _dispatch(self, frame: Frame) -> None:
        if self.closed:
            return  # said goodbye: only the end of the stream is awaited
        flow = frame.envelope.flow
        if flow == Flow.ONEWAY:
            message = self._vocabulary.decode(frame.envelope.body)
            try:
                await self._handler.on_message(self, message, frame.payload)
            except LinkClosed:
                return
            except Exception:
                log.exception("a handler failed on a %s", type(message).__name__)
        elif flow in self._flows:
            self._flows[flow](frame)
        else:
            raise FrameError(f"a {flow.name} frame is out of place")

    def _on_request(self, frame: Frame) -> None:
        message = self._vocabulary.decode(frame.envelope.body)
        answer = self._handler.on_request
        self._answering.request(frame.envelope.id, len(frame.payload), lambda: answer(self, message, frame.payload))

    def _on_stream(self, frame: Frame) -> None:
        message = self._vocabulary.decode(frame.envelope.body)
        answer = self._handler.on_stream
        self._answering.stream(frame.envelope.id, len(frame.payload), lambda: answer(self, message, frame.payload))

    def _on_reply(self, frame: Frame) -> None:
        self._asked.reply(frame.envelope.id, self._vocabulary.decode(frame.envelope.body), frame.payload)

    def _on_error(self, frame: Frame) -> None:
        body = decode_body(frame.envelope.body, ErrorBody)
        self._asked.error(frame.envelope.id, RemoteError(body.code, body.message))

    def _on_item(self, frame: Frame) -> None:
        self._asked.item(frame.envelope.id, self._vocabulary.decode(frame.envelope.body))

    def _on_credit(self, frame: Frame) -> None:
        self._answering.grant(frame.envelope.id, decode_body(frame.envelope.body, int))

    def _on_goodbye(self, frame: Frame) -> None:
        self._break(f"the other side closed the link: {one_line(decode_body(frame.envelope.body, str))}")
