"""Certificates that no honest node would make, for tests: each as the credentials of a node."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from support.link_fakes import new_credentials

from swarmd.transport import authority
from swarmd.transport.identity import Credentials, issue_credentials
from swarmd.transport.token import JoinToken

NOW = dt.datetime.now(dt.UTC)
DAY = dt.timedelta(days=1)


def leaf(
    key: Ed25519PrivateKey,
    signer: Ed25519PrivateKey,
    issuer: x509.Name,
    *,
    subject: str = "",
    since: dt.datetime = NOW - DAY,
    until: dt.datetime = NOW + DAY,
) -> bytes:
    """A node's certificate (PEM), signed by any key in any name."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject or "forged")])
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    made = (
        x509.CertificateBuilder(issuer, name, key.public_key(), x509.random_serial_number(), since, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(signer, algorithm=None)
    )
    return made.public_bytes(Encoding.PEM)


def _issuer(token: JoinToken) -> x509.Name:
    return authority.authority_certificate(token).subject


def _with(token: JoinToken, **fields: object) -> Credentials:
    """Credentials whose certificate the token's authority has signed, but for what the fields change."""
    key = Ed25519PrivateKey.generate()
    signer = fields.pop("signer", authority.authority_key(token))
    own = issue_credentials(key, token)
    return replace(own, certificate_pem=leaf(key, signer, _issuer(token), **fields))  # type: ignore[arg-type]


def expired(token: JoinToken) -> Credentials:
    """Its time is over."""
    return _with(token, since=NOW - 3 * DAY, until=NOW - DAY)


def not_yet_valid(token: JoinToken) -> Credentials:
    """Its time has not come."""
    return _with(token, since=NOW + DAY, until=NOW + 3 * DAY)


def foreign(token: JoinToken) -> Credentials:
    """Of another swarm; it would accept this one."""
    own = new_credentials(JoinToken.generate())
    return replace(
        own, authority_pem=own.authority_pem + issue_credentials(Ed25519PrivateKey.generate(), token).authority_pem
    )


def namesake(token: JoinToken) -> Credentials:
    """Signed by another key in the name of the swarm's authority."""
    return _with(token, signer=Ed25519PrivateKey.generate())


def self_signed(token: JoinToken) -> Credentials:
    """Signed by the node's own key."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "forged")])
    return replace(issue_credentials(key, token), certificate_pem=leaf(key, key, name))


def by_a_member(token: JoinToken) -> Credentials:
    """Signed by a member, which is no authority; its certificate comes along."""
    member_key, key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    member = issue_credentials(member_key, token).certificate_pem
    issuer = x509.load_pem_x509_certificate(member).subject
    return replace(issue_credentials(key, token), certificate_pem=leaf(key, member_key, issuer) + member)


def in_the_name_of(token: JoinToken, node_id: str) -> Credentials:
    """A member's, which says that it is another node's."""
    return _with(token, subject=node_id)
