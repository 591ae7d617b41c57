"""Who a node is: its key pair, its certificate, and how they are kept on disk.

A data directory holds ``node.key`` (PKCS#8 PEM, mode 0600), ``node.crt`` and ``swarm.crt`` (PEM), and on
nodes that may invite others ``token`` (text, mode 0600). Every write is atomic: a killed process leaves the
old file or the new one.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from swarmd.transport import authority
from swarmd.transport.private_files import IdentityError, read_file, write_file
from swarmd.transport.rotation_file import load_rotation
from swarmd.transport.token import JoinToken, TokenError

__all__ = [
    "Credentials",
    "IdentityError",
    "issue_credentials",
    "load_credentials",
    "load_or_create_node_key",
    "load_token",
    "node_id_of_certificate",
    "save_credentials",
    "save_token",
    "swarm_of_certificate",
]

KEY_FILE = "node.key"
CERTIFICATE_FILE = "node.crt"
AUTHORITY_FILE = "swarm.crt"
TOKEN_FILE = "token"


@dataclass(frozen=True)
class Credentials:
    """What a process needs to speak as a node of one swarm. Its `repr` never shows the key.

    `node_id` is 64 hex digits, `swarm_tag` 16; the rest is PEM. `alternative`: while the swarm changes its token, what
    this node holds of the other authority. Both are accepted; the alternative is shown to who accepts only that.
    """

    node_id: str
    swarm_tag: str
    key_pem: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)
    authority_pem: bytes = field(repr=False)
    alternative: Credentials | None = field(default=None, repr=False)

    @property
    def trusted_pem(self) -> bytes:
        """The certificates of all authorities that are accepted."""
        return self.authority_pem + (b"" if self.alternative is None else self.alternative.authority_pem)

    @property
    def swarm_tags(self) -> frozenset[str]:
        """The public names that the swarm has at present."""
        return frozenset(self.authority_keys())

    def authority_keys(self) -> dict[str, Ed25519PublicKey]:
        """The public keys of the authorities whose statements count, by swarm tag."""
        key = x509.load_pem_x509_certificate(self.authority_pem).public_key()
        assert isinstance(key, Ed25519PublicKey)
        others = {} if self.alternative is None else self.alternative.authority_keys()
        return {self.swarm_tag: key} | others


def load_or_create_node_key(directory: Path) -> Ed25519PrivateKey:
    """The node's persistent key, made on first use.

    Two processes that start at once on one directory end up with the same key. Raises `IdentityError` if the
    directory or the file cannot be used, is damaged, or can be read by other users.
    """
    path = directory / KEY_FILE
    text = read_file(path, private=True)
    if text is None:
        fresh = Ed25519PrivateKey.generate()
        write_file(path, _key_pem(fresh), mode=0o600, replace=False)
        text = read_file(path, private=True) or b""
    return _parse_key(path, text)


def issue_credentials(key: Ed25519PrivateKey, token: JoinToken) -> Credentials:
    """Join the token's swarm: the node issues itself a certificate under the swarm's authority."""
    leaf = authority.issue_leaf(key.public_key(), token, dt.datetime.now(dt.UTC))
    return Credentials(
        node_id=authority.node_id_of_key(key.public_key()),
        swarm_tag=token.swarm_tag,
        key_pem=_key_pem(key),
        certificate_pem=leaf.public_bytes(Encoding.PEM),
        authority_pem=authority.authority_certificate(token).public_bytes(Encoding.PEM),
    )


def save_credentials(directory: Path, credentials: Credentials) -> None:
    """Keep credentials for the next start; `IdentityError` if the directory cannot be written."""
    write_file(directory / KEY_FILE, credentials.key_pem, mode=0o600)
    write_file(directory / AUTHORITY_FILE, credentials.authority_pem, mode=0o644)
    write_file(directory / CERTIFICATE_FILE, credentials.certificate_pem, mode=0o644)


def load_credentials(directory: Path) -> Credentials | None:
    """The saved credentials, or None if this node has not joined a swarm yet.

    Raises `IdentityError` if a file is unreadable or damaged, if the key is open to other users, or if the
    three files do not belong together.
    """
    key_pem = read_file(directory / KEY_FILE, private=True)
    leaf_pem, authority_pem = read_file(directory / CERTIFICATE_FILE), read_file(directory / AUTHORITY_FILE)
    if key_pem is None or leaf_pem is None or authority_pem is None:
        return None
    rotation = load_rotation(directory)
    if rotation is None or rotation.phase == "asked":
        return _credentials(directory, key_pem, leaf_pem, authority_pem)
    fresh = _credentials(directory, key_pem, rotation.certificate.encode(), rotation.authority.encode())
    try:
        old = _credentials(directory, key_pem, leaf_pem, authority_pem)
    except IdentityError:
        # Killed while it put the new files in the place of the old ones: the rotation will be finished.
        if rotation.phase == "switched":
            return fresh
        raise
    return replace(old, alternative=fresh) if rotation.phase == "prepared" else replace(fresh, alternative=old)


def _credentials(directory: Path, key_pem: bytes, leaf_pem: bytes, authority_pem: bytes) -> Credentials:
    """Credentials of their parts, checked to belong together; `directory` is for the errors."""
    key_path, leaf_path = directory / KEY_FILE, directory / CERTIFICATE_FILE
    authority_path = directory / AUTHORITY_FILE
    key = _parse_key(key_path, key_pem)
    leaf = _parse_certificate(leaf_path, leaf_pem)
    root = _parse_certificate(authority_path, authority_pem)
    try:
        leaf.verify_directly_issued_by(root)
        swarm_tag = authority.swarm_tag_of(root)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise IdentityError(
            f"{leaf_path} was not issued by {authority_path}; delete both and run `swarmd join TOKEN` again"
        ) from error
    if leaf.public_key() != key.public_key():
        raise IdentityError(
            f"{leaf_path} belongs to another key than {key_path}; delete it and run `swarmd join TOKEN` again"
        )
    return Credentials(
        node_id=authority.node_id_of_key(key.public_key()),
        swarm_tag=swarm_tag,
        key_pem=key_pem,
        certificate_pem=leaf_pem,
        authority_pem=authority_pem,
    )


def save_token(directory: Path, token: JoinToken) -> None:
    """Keep the token (mode 0600) on a node that may invite others.

    `IdentityError` if it cannot be written.
    """
    write_file(directory / TOKEN_FILE, f"{token}\n".encode(), mode=0o600)


def load_token(directory: Path) -> JoinToken | None:
    """The saved token, or None on a node that may not invite.

    `IdentityError` if the file is damaged or open to others.
    """
    path = directory / TOKEN_FILE
    text = read_file(path, private=True)
    if text is None:
        return None
    try:
        return JoinToken.parse(text.decode("ascii", errors="replace"))
    except TokenError as error:
        raise IdentityError(f"{path} is damaged ({error}); copy it again from another member") from None


def node_id_of_certificate(der: bytes) -> str:
    """The id of the node that owns a certificate (DER): 64 hex digits.

    `IdentityError` if it is not an Ed25519 one.
    """
    try:
        key = x509.load_der_x509_certificate(der).public_key()
    except ValueError as error:
        raise IdentityError("the certificate cannot be read") from error
    if not isinstance(key, Ed25519PublicKey):
        raise IdentityError("the certificate does not hold an Ed25519 key")
    return authority.node_id_of_key(key)


def swarm_of_certificate(der: bytes) -> str:
    """The tag of the swarm whose authority has issued a node's certificate (DER), as that says.

    `IdentityError` if it says none.
    """
    try:
        return authority.swarm_tag_in(x509.load_der_x509_certificate(der).issuer)
    except ValueError as error:
        raise IdentityError("the certificate names no swarm") from error


def _key_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _parse_key(path: Path, text: bytes) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(text, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(
            f"{path} is damaged: it holds no Ed25519 key; restore it from a backup, "
            "or delete it and join again as a new node"
        )
    return key


def _parse_certificate(path: Path, text: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(text)
    except ValueError:
        raise IdentityError(
            f"{path} is damaged: it holds no certificate; delete it and run `swarmd join TOKEN` again"
        ) from None
