"""From a connected socket to two nodes that have said hello."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from swarmd.transport.frames import (
    HELLO_LIMITS,
    Envelope,
    Flow,
    Frame,
    FrameDecoder,
    FrameError,
    Limits,
    encode_head,
)
from swarmd.transport.identity import IdentityError, node_id_of_certificate
from swarmd.transport.messages import (
    EMPTY,
    PROTOCOL_VERSION,
    Hello,
    decode_body,
    decode_hello,
    encode_body,
    one_line,
)
from swarmd.transport.statements import EVICTED
from swarmd.transport.tls import ALPN, explain_tls_error
from swarmd.transport.tls_socket import TlsSocket

_REFUSED = "it refused: "


class LinkRefused(ConnectionError):
    """No link came about; `reason` is a sentence about the other side ("it belongs to another swarm ...").

    `nobody_listens`: its machine answers that there is no such program any more.
    """

    def __init__(self, reason: str, *, nobody_listens: bool = False):
        super().__init__(reason)
        self.reason = reason
        self.nobody_listens = nobody_listens

    @property
    def evicted(self) -> bool:
        """Whether the other side says that this node was evicted: it will say so again at the next try."""
        return self.reason.startswith(f"{_REFUSED}{EVICTED}")

    @property
    def lasting(self) -> bool:
        """Whether one of the two is evicted, so that the next try will end like this one."""
        return EVICTED in self.reason


class Introduction(NamedTuple):
    """What both sides know once the hellos are accepted. `certificate` is the other side's (DER).

    The decoder may already hold the bytes that follow.
    """

    peer_id: str
    peer: Hello
    decoder: FrameDecoder
    certificate: bytes = b""


async def introduce(
    sock: TlsSocket, hello: Hello, refused: Mapping[str, str], *, server_side: bool, expect: str | None
) -> Introduction:
    """Do the TLS handshake and exchange hellos; the caller sets the time limit. The nodes in `refused` are told why.

    Each side sends its hello first and waits for the other's, because the dialling side of TLS 1.3 is done
    before the dialled one has checked its certificate. Raises `LinkRefused`; the other side is told why where
    it can be told.
    """
    try:
        certificate = await sock.handshake()
        if sock.protocol != ALPN:
            raise LinkRefused("it speaks TLS but not the link protocol (not a swarmd node?)")
        peer_id = node_id_of_certificate(certificate)
        if expect is not None and peer_id != expect:
            await _say_goodbye(sock, f"it looks for node {expect[:12]} here")
            raise LinkRefused(f"it is node {peer_id[:12]}, not {expect[:12]}")
        if peer_id in refused:
            await _say_goodbye(sock, refused[peer_id])
            raise LinkRefused(f"node {peer_id[:12]} is {refused[peer_id]}")
        await sock.send_all(_frame(Flow.HELLO, encode_body(hello)))
        decoder = FrameDecoder(HELLO_LIMITS)
        peer = _accept(await _first_frame(sock, decoder))
        objection = _objection(hello, peer)
        if objection is not None:
            await _say_goodbye(sock, objection)
            raise LinkRefused(objection)
    except FrameError as error:
        raise LinkRefused(f"it does not speak the link protocol: {error}") from error
    except IdentityError as error:
        raise LinkRefused(f"its identity cannot be read: {error}") from error
    except LinkRefused:
        raise
    except OSError as error:
        raise LinkRefused(explain_tls_error(error, server_side=server_side)) from error
    decoder.limits = Limits()
    return Introduction(peer_id, peer, decoder, certificate)


async def _first_frame(sock: TlsSocket, decoder: FrameDecoder) -> Frame:
    while (frame := decoder.next_frame()) is None:
        count = await sock.recv_into(decoder.buffer())
        if count == 0:
            raise LinkRefused("it closed the connection before its hello")
        decoder.advance(count)
    return frame


def _accept(frame: Frame) -> Hello:
    if frame.envelope.flow == Flow.GOODBYE:
        raise LinkRefused(f"{_REFUSED}{one_line(decode_body(frame.envelope.body, str))}")
    if frame.envelope.flow != Flow.HELLO:
        raise FrameError("its first frame is not a hello")
    return decode_hello(frame.envelope.body)


def _objection(own: Hello, peer: Hello) -> str | None:
    if own.endpoint and peer.endpoint == own.endpoint:
        return "it is this process itself"
    if peer.protocol != PROTOCOL_VERSION or own.protocol != PROTOCOL_VERSION:
        return (
            f"the protocols differ: {own.name} speaks version {own.protocol} (swarmd {own.version}) and "
            f"{peer.name} version {peer.protocol} (swarmd {peer.version}); install the same swarmd on both"
        )
    return None


async def _say_goodbye(sock: TlsSocket, reason: str) -> None:
    await sock.send_all(_frame(Flow.GOODBYE, encode_body(reason)))


def _frame(flow: Flow, body: msgspec.Raw = EMPTY) -> bytes:
    return encode_head(Envelope(flow, 0, body), 0)


async def hang_up(sock: TlsSocket, seconds: float = 1.0) -> None:
    """Close a connection that led to no link so that the other side still reads why."""
    try:
        await sock.linger(seconds)
    except asyncio.CancelledError:
        sock.close()
        raise
