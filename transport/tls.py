"""TLS for links: version 1.3 only, certificates on both sides, the swarm's authority as the sole anchor.

Host names are not checked, because a node is known by its key and not by its address: the link compares the
id in the certificate with the one it expects.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from pathlib import Path

from swarmd.transport.identity import Credentials

ALPN = "swarmd/1"

OTHER_SWARM = "it belongs to another swarm (its join token differs)"
NOT_TLS = "it does not speak TLS (not a swarmd node?)"
_OUR_CLOCK = "it finds this node's certificate not valid at this time; set the clocks of both machines"
_NOT_YET = "its certificate is not valid yet; set the clocks of both machines"
_EXPIRED = "its certificate has expired; set the clocks of both machines"

# X509_V_ERR_* of OpenSSL's x509_vfy.h.
_NOT_YET_CODES = {9, 13}
_EXPIRED_CODES = {10, 14}
_OTHER_SWARM_CODES = {2, 7, 18, 19, 20, 21, 24}

_REASONS = {
    "TLSV1_ALERT_UNKNOWN_CA": "it says that this node belongs to another swarm (the join tokens differ)",
    "TLSV1_ALERT_DECRYPT_ERROR": "it says that this node belongs to another swarm (the join tokens differ)",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": _OUR_CLOCK,
    "SSLV3_ALERT_BAD_CERTIFICATE": _OUR_CLOCK,
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it received no certificate from this node",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate (not a member of a swarm)",
    "HTTP_REQUEST": "it sent a plain HTTP request; this port is for links, the web page is on another",
    "HTTPS_PROXY_REQUEST": "it sent a plain HTTP request; this port is for links, the web page is on another",
    "WRONG_VERSION_NUMBER": NOT_TLS,
    "UNKNOWN_PROTOCOL": NOT_TLS,
    "RECORD_LAYER_FAILURE": NOT_TLS,
    "PACKET_LENGTH_TOO_LONG": NOT_TLS,
    "ENCRYPTED_LENGTH_TOO_LONG": NOT_TLS,
    "BAD_RECORD_TYPE": NOT_TLS,
    "NOT_SSL_RECORD_OR_TLS_ALERT": NOT_TLS,
    "UNEXPECTED_MESSAGE": NOT_TLS,
    "LENGTH_MISMATCH": NOT_TLS,
    "UNSUPPORTED_PROTOCOL": "it speaks a TLS older than 1.3 (not a swarmd node?)",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks a TLS older than 1.3 (not a swarmd node?)",
    "NO_SHARED_CIPHER": "it shares no cipher with this node (not a swarmd node?)",
    "UNEXPECTED_EOF_WHILE_READING": "it closed the connection during the handshake",
}


def server_context(credentials: Credentials) -> ssl.SSLContext:
    """A context for accepting links: demands a certificate, issues no session tickets.

    While the swarm changes its token, it shows the certificate of the authority that the other side names.
    """
    context = _accepting(credentials, credentials.trusted_pem)
    if credentials.alternative is not None:
        asked_for = server_name(credentials.alternative.swarm_tag)
        other = _accepting(credentials.alternative, credentials.trusted_pem)

        def choose(sock: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            if name == asked_for:
                sock.context = other

        context.sni_callback = choose
    return context


def server_name(swarm_tag: str) -> str:
    """What a client says in its first message (SNI): the public name of the swarm whose certificate it shows."""
    return f"{swarm_tag}.swarmd"


def client_context(credentials: Credentials, trusted_pem: bytes = b"") -> ssl.SSLContext:
    """A context for dialling links: shows the node's certificate and checks the other side's, against `trusted_pem` if
    given.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, credentials, trusted_pem or credentials.trusted_pem)
    context.check_hostname = False
    return context


def explain_tls_error(error: BaseException, *, server_side: bool) -> str:
    """One line that says in human words why a handshake failed; `it` is the other side.

    Takes any exception that a connection attempt can raise; `server_side` says whether this node was dialled.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return _explain_certificate(error)
    if isinstance(error, TimeoutError):
        return "it did not finish the handshake in time (silent, or not a swarmd node)"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        if isinstance(error, ssl.SSLEOFError) and not reason:
            reason = "UNEXPECTED_EOF_WHILE_READING"
        return _REASONS.get(reason, f"the TLS handshake failed ({reason.lower().replace('_', ' ') or 'no reason'})")
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there (is swarmd running, is the port right?)"
    if isinstance(error, ConnectionError):
        return "it closed the connection during the handshake" if server_side else "it closed the connection"
    if isinstance(error, OSError):
        return f"the network failed ({error.strerror or error})"
    return f"{type(error).__name__}: {error}"


def says_other_swarm(reason: str) -> bool:
    """Whether a reason of `explain_tls_error` is that the other side does not know this node's authority."""
    return reason == _REASONS["TLSV1_ALERT_UNKNOWN_CA"]


def _explain_certificate(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in _NOT_YET_CODES:
        return _NOT_YET
    if error.verify_code in _EXPIRED_CODES:
        return _EXPIRED
    if error.verify_code in _OTHER_SWARM_CODES:
        return OTHER_SWARM
    return f"its certificate is not acceptable ({error.verify_message})"


def _accepting(credentials: Credentials, trusted_pem: bytes) -> ssl.SSLContext:
    context = _context(ssl.PROTOCOL_TLS_SERVER, credentials, trusted_pem)
    context.num_tickets = 0
    return context


def _context(protocol: int, credentials: Credentials, trusted_pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=trusted_pem.decode("ascii"))
    context.set_alpn_protocols([ALPN])
    # OpenSSL reads a key only from a file: mkstemp makes it 0600, and it is gone before anything is sent.
    descriptor, name = tempfile.mkstemp(prefix="swarmd-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(credentials.certificate_pem + credentials.key_pem)
        context.load_cert_chain(name)
    finally:
        Path(name).unlink(missing_ok=True)
    return context


def explain_tampering(error: ssl.SSLError) -> str:
    """Why an established connection cannot be read on: its records do not fit each other any more."""
    reason = (error.reason or "no reason").lower().replace("_", " ")
    return f"its bytes were changed on the way ({reason})"
