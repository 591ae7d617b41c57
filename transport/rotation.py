"""The steps of a rotation on one node: what it accepts from whoever holds the token, and what it then holds. No clock.

The old authority signs both steps, so only who holds the old token can begin or end one; the new certificates are
signed by the new authority, so they come from who holds the new token.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from msgspec.structs import replace

from swarmd.transport import authority
from swarmd.transport.denial_files import forget_denials
from swarmd.transport.identity import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    TOKEN_FILE,
    Credentials,
    load_token,
    save_token,
)
from swarmd.transport.private_files import write_file
from swarmd.transport.rotation_file import RotationFile, end_rotation, load_rotation
from swarmd.transport.statements import Denials, Handover, StatementError, Succession, is_signed_by, signed
from swarmd.transport.token import JoinToken


def announce(old: JoinToken, new: JoinToken, serial: int) -> Succession:
    """The old authority's word that the new one is to follow it."""
    certificate = authority.authority_certificate(new).public_bytes(Encoding.DER)
    return signed(Succession(old.swarm_tag, certificate, serial, bytes(64)), old)


def hand_over(old: JoinToken, new: JoinToken, members: Iterable[str]) -> Handover:
    """The old authority's word that the new one counts from now on, for these members."""
    return signed(Handover(old.swarm_tag, new.swarm_tag, tuple(sorted(members)), bytes(64)), old)


def certify(peer_certificate: bytes, token: JoinToken, now: dt.datetime) -> bytes:
    """A certificate (DER) under a token's authority for the key of a node's present one (DER)."""
    key = x509.load_der_x509_certificate(peer_certificate).public_key()
    assert isinstance(key, Ed25519PublicKey), "a link's certificate holds an Ed25519 key"
    return authority.issue_leaf(key, token, now).public_bytes(Encoding.DER)


def accept_offer(
    own: Credentials, present: RotationFile | None, succession: Succession, certificate: bytes, since: int
) -> RotationFile:
    """This node is to be prepared; what it then keeps. Raises `StatementError` for an offer that does not hold.

    `present` is the rotation under way here, if any: a later one replaces it unless it has been switched to.
    """
    if present is not None and present.phase != "prepared":
        raise StatementError("this node is changing its authority already")
    if present is not None and succession.serial < present.serial:
        raise StatementError("a later change is under way")
    _check_signed(own, succession)
    try:
        root = x509.load_der_x509_certificate(succession.authority)
        leaf = x509.load_der_x509_certificate(certificate)
        tag = authority.swarm_tag_of(root)
        root.verify_directly_issued_by(root)
        leaf.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        raise StatementError("its certificates do not belong together") from None
    if tag == own.swarm_tag:
        raise StatementError("it changes nothing")
    if leaf.public_key() != load_pem_private_key(own.key_pem, password=None).public_key():
        raise StatementError("its certificate is for another node")
    return RotationFile("prepared", since, succession.serial, "", _pem(leaf), _pem(root))


def accept_handover(own: Credentials, present: RotationFile | None, handover: Handover, since: int) -> RotationFile:
    """This node is to switch; what it then keeps. Raises `StatementError` for an order that does not hold."""
    if present is None or present.phase == "asked" or own.alternative is None:
        raise StatementError("this node holds no certificate of the new authority")
    if present.phase == "switched":
        return present
    _check_signed(own, handover)
    if handover.successor != own.alternative.swarm_tag:
        raise StatementError("it is for another authority than this node was prepared for")
    return replace(present, phase="switched", since=since, members=handover.members)


def finish(directory: Path) -> None:
    """Only the new authority counts from now on. May be repeated after a crash. Raises `IdentityError`."""
    rotation = load_rotation(directory)
    if rotation is None or rotation.phase != "switched":
        return
    write_file(directory / AUTHORITY_FILE, rotation.authority.encode(), mode=0o644)
    write_file(directory / CERTIFICATE_FILE, rotation.certificate.encode(), mode=0o644)
    if rotation.token:
        save_token(directory, JoinToken.parse(rotation.token))
    elif load_token(directory) is not None:
        (directory / TOKEN_FILE).unlink()
    forget_denials(directory, Denials({}))
    end_rotation(directory)


def _check_signed(own: Credentials, statement: Succession | Handover) -> None:
    key = own.authority_keys().get(own.swarm_tag)
    if statement.swarm != own.swarm_tag or key is None or not is_signed_by(key, statement):
        raise StatementError("its signature is not of this swarm's authority")


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode("ascii")
