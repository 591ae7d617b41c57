"""A link: an authenticated, encrypted connection of two processes with messages, requests and streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable

import msgspec
from msgspec import Struct

from swarmd.transport.dispatch import Dispatch
from swarmd.transport.exchanges import Answering, Asked, Reply
from swarmd.transport.frames import Buffer, Envelope, Flow, FrameError, payload_view
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
    encode_body,
    one_line,
)
from swarmd.transport.outbox import Outbox
from swarmd.transport.receiver import Receiver
from swarmd.transport.streams import RemoteStream
from swarmd.transport.tls import explain_tampering
from swarmd.transport.tls_socket import TlsSocket

__all__ = ["PROTOCOL_VERSION", "Hello", "Link", "LinkClosed", "LinkHandler", "RemoteError", "RemoteStream", "Role"]
__all__ += ["Vocabulary"]

log = logging.getLogger("swarmd.transport")

_CLOSE_SECONDS = 1.0


class Link:
    """One end of a link. Made by an `Endpoint`.

    Messages and requests of one link arrive in the order in which they were sent. Payloads are at most 64 MiB and are
    not copied on the way out: they must stay unchanged until the call returns. A large one holds up what follows it.
    """

    def __init__(
        self,
        sock: TlsSocket,
        introduction: Introduction,
        vocabulary: Vocabulary,
        handler: LinkHandler,
        *,
        initiator: bool,
        on_breach: Callable[[Link, FrameError | LinkClosed], None],
    ):
        """`on_breach` hears of a breach of the protocol, which ends the link, and of an end without a goodbye."""
        self.peer_id = introduction.peer_id
        self.peer = introduction.peer
        self.peer_certificate = introduction.certificate
        self.initiator = initiator
        self.remote_address = sock.remote_address
        self.local_address = sock.local_address
        self.close_reason = ""
        self._sock = sock
        self._vocabulary = vocabulary
        self._handler = handler
        self._on_breach = on_breach
        self._outbox = Outbox(sock, self._break)
        self._asked = Asked()
        self._answering = Answering(self._put_message, self._put_item, self._post_error, self._post_end)
        self._telling = False  # `on_closed` is due or running
        self._finished = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        dispatch = Dispatch(self, vocabulary, handler, self._asked, self._answering, self._break)
        self._receiver = Receiver(sock, introduction.decoder, dispatch.take)

    def __repr__(self) -> str:
        return f"Link({self.peer.role} {self.peer.name!r} {self.peer_id[:12]} at {self.remote_address})"

    @property
    def closed(self) -> bool:
        """Whether the link is down or going down; `close_reason` then says why."""
        return bool(self.close_reason)

    @property
    def received_bytes(self) -> int:
        """How much has come so far, also of a frame that is not complete: on a slow network, that is a sign of life."""
        return self._receiver.received

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

    def send_soon(self, message: Struct | msgspec.Raw, payload: Buffer = b"") -> None:
        """Send a one-way message without waiting: at once if the network is ready, else behind what came before it.

        For senders that bound by themselves how much they have on its way; more than 1024 frames end the link. The
        payload must stay unchanged for good. The message may have been encoded before (`encode`). Raises `LinkClosed`,
        `FrameError` if it is too large, `TypeError` if it is not in the vocabulary; a failure that shows later ends the
        link.
        """
        body = message if isinstance(message, msgspec.Raw) else self.encode(message)
        view = payload_view(payload)
        self._check_open()
        self._outbox.post(Envelope(Flow.ONEWAY, 0, body), view)

    def encode(self, message: Struct) -> msgspec.Raw:
        """A message of this link's vocabulary as it is sent. Raises `TypeError` if it is not in it."""
        return self._vocabulary.encode(message)

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
        await self._put(envelope, view)

    async def _put(self, envelope: Envelope, view: memoryview) -> None:
        try:
            await self._outbox.put(envelope, view)
        except OSError as error:
            self._break(f"sending failed: {error.strerror or error}")
            raise LinkClosed(self.close_reason) from error

    async def _put_item(self, exchange_id: int, item: Struct) -> None:
        envelope = Envelope(Flow.STREAM_ITEM, exchange_id, self._vocabulary.encode(item))
        self._check_open()
        if not self._outbox.gather(envelope):
            await self._put(envelope, memoryview(b""))

    def _post(self, flow: Flow, exchange_id: int, body: msgspec.Raw = EMPTY) -> None:
        if not self.closed:
            self._outbox.post(Envelope(flow, exchange_id, body))

    def _post_error(self, exchange_id: int, error: RemoteError) -> None:
        self._post(Flow.ERROR, exchange_id, encode_body(ErrorBody(error.code[:64], one_line(error.message, 4096))))

    def _post_end(self, exchange_id: int) -> None:
        envelope = Envelope(Flow.STREAM_END, exchange_id, EMPTY)
        if not self.closed and not self._outbox.gather(envelope):
            self._outbox.post(envelope)

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

    def _lose(self, reason: str, *, suspicious: bool) -> None:
        """The other side's bytes have come to an end that it did not announce."""
        if not self.closed:
            self._on_breach(self, FrameError(reason) if suspicious else LinkClosed(reason))
        self._break(reason)

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
            await self._receiver.run()
            middle = "in the middle of a frame" if self._receiver.in_frame else "without a goodbye"
            self._lose(f"the other side closed the connection {middle}", suspicious=self._receiver.in_frame)
        except ssl.SSLError as error:
            self._lose(explain_tampering(error), suspicious=True)
        except FrameError as error:
            self._on_breach(self, error)
            self._post(Flow.GOODBYE, 0, encode_body(one_line(str(error))))
            self._break(f"protocol error: {error}")
        except OSError as error:
            self._break(f"the connection failed: {error.strerror or error}")
