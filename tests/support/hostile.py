"""What strangers, and a member gone bad, do to a node's link port. Each attack is one connection and ends by itself."""

from __future__ import annotations

import contextlib
import datetime as dt
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from msgspec import Struct

from swarmd.node.cluster.messages import DAEMON_MESSAGES
from swarmd.transport.endpoint import Endpoint
from swarmd.transport.frames import Envelope, Flow, encode_head
from swarmd.transport.identity import issue_credentials
from swarmd.transport.link import PROTOCOL_VERSION, Hello, Link, RemoteError, Role, Vocabulary
from swarmd.transport.messages import encode_body
from swarmd.transport.tls import ALPN, client_context
from swarmd.transport.token import JoinToken

SECONDS = 20.0
TWO_GIB = 1 << 31


def send_plainly(port: int, data: bytes) -> bytes:
    """Plain TCP: send, and read until the node ends it."""
    with _connect(port) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(data)
        return _read_all(sock)
    return b""


def break_off_handshake(port: int) -> None:
    """Half of a TLS client's first message, and gone."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = _unchecking_context().wrap_bio(incoming, outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    with _connect(port) as sock:
        sock.sendall(hello[: len(hello) // 2])


def show_certificate(port: int, context: ssl.SSLContext) -> bytes:
    """A whole TLS handshake with a certificate that no authority of the swarm has signed."""
    with _connect(port) as sock, contextlib.suppress(OSError), context.wrap_socket(sock) as tls:
        return _read_all(tls)
    return b""


def self_signed_context(directory: Path) -> ssl.SSLContext:
    """A client's context with a key and a certificate of its own making."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "swarmd")])
    now = dt.datetime.now(dt.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=9))
    file = directory / "self-signed.pem"
    file.write_bytes(
        made.sign(key, None).public_bytes(Encoding.PEM)
        + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    context = _unchecking_context()
    context.load_cert_chain(file)
    return context


class BadMember:
    """Holds the token, and announces frames that no memory could hold."""

    def __init__(self, token: str) -> None:
        self._context = client_context(issue_credentials(Ed25519PrivateKey.generate(), JoinToken.parse(token)))

    def announce(self, port: int, header: int, payload: int, *, after_hello: bool) -> bytes:
        """Send a frame's lengths in place of a hello or after it; all that the node says, decrypted."""
        hello = encode_body(Hello(PROTOCOL_VERSION, "daemon", "bad", "0"))
        opening = encode_head(Envelope(Flow.HELLO, 0, hello), 0) if after_hello else b""
        with _connect(port) as sock, self._context.wrap_socket(sock) as tls:
            tls.sendall(opening + struct.pack(">II", header, payload) + bytes(4096))
            return _read_all(tls)


class Mallory:
    """A member gone bad: it belongs to the swarm, and says what it likes over links that are as they should be."""

    def __init__(self, token: JoinToken) -> None:
        credentials = issue_credentials(Ed25519PrivateKey.generate(), token)
        self._role: Role = "daemon"
        self.endpoint = Endpoint(
            credentials,
            Vocabulary(DAEMON_MESSAGES),
            self,
            hello=lambda: Hello(PROTOCOL_VERSION, self._role, "mallory", "0"),
        )

    async def dial(self, port: int, role: Role = "daemon") -> Link:
        """A link to a process of this machine."""
        self._role = role
        return await self.endpoint.dial("127.0.0.1", port)

    async def on_link(self, link: Link) -> None:
        """Glad to be in."""

    async def on_message(self, link: Link, message: Struct, payload: bytearray) -> None:
        """Deaf."""

    async def on_request(self, link: Link, message: Struct, payload: bytearray) -> Struct:
        """Not helpful either."""
        raise RemoteError("no", "no")

    def on_stream(self, link: Link, message: Struct, payload: bytearray) -> AsyncIterator[Struct]:
        """Nor that."""
        raise RemoteError("no", "no")

    async def on_closed(self, link: Link, reason: str) -> None:
        """So what."""


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), SECONDS)


def _read_all(sock: socket.socket) -> bytes:
    """Until the other side closes, in whatever manner; TimeoutError if it does not."""
    said = b""
    while True:
        try:
            part = sock.recv(65536)
        except (ConnectionError, ssl.SSLError):
            return said
        if not part:
            return said
        said += part


def _unchecking_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([ALPN])
    return context
