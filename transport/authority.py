"""Certificates: the swarm's authority, derived from the join token, and the nodes' own.

The authority is an Ed25519 key whose 32-byte seed is HKDF-SHA256(secret, info=``swarmd/1 authority key``).
Its certificate has a fixed serial number and fixed dates, and Ed25519 signatures are deterministic, so every
node that holds the token computes the same bytes without talking to another.
"""

from __future__ import annotations

import datetime as dt
import hashlib

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from swarmd.transport.token import JoinToken, derive

AUTHORITY_INFO = b"swarmd/1 authority key"
AUTHORITY_SERIAL = 1
NOT_BEFORE = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
NOT_AFTER = dt.datetime(2120, 1, 1, tzinfo=dt.UTC)
LEAF_BACKDATE = dt.timedelta(days=7)
_NAME_PREFIX = "swarmd swarm "


def node_id_of_key(key: Ed25519PublicKey) -> str:
    """The node id that belongs to a public key: 64 hex digits, SHA-256 of its SubjectPublicKeyInfo (DER)."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def authority_key(token: JoinToken) -> Ed25519PrivateKey:
    """The swarm's signing key; whoever holds the token can compute it."""
    return Ed25519PrivateKey.from_private_bytes(derive(token.secret, AUTHORITY_INFO, 32))


def authority_certificate(token: JoinToken) -> x509.Certificate:
    """The swarm's self-signed certificate; identical bytes on every node that holds the token."""
    key = authority_key(token)
    name = _authority_name(token.swarm_tag)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(AUTHORITY_SERIAL)
        .not_valid_before(NOT_BEFORE)
        .not_valid_after(NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, algorithm=None)
    )


def issue_leaf(public_key: Ed25519PublicKey, token: JoinToken, now: dt.datetime) -> x509.Certificate:
    """A certificate for a node's key under the swarm's authority.

    It is valid from a week before `now`, because clocks of home machines differ, until the authority itself
    ends: a member leaves by eviction or rotation, not because a date passed while it was switched off.
    """
    signer = authority_key(token)
    not_before = min(max(now - LEAF_BACKDATE, NOT_BEFORE), NOT_AFTER - LEAF_BACKDATE)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node_id_of_key(public_key))]))
        .issuer_name(_authority_name(token.swarm_tag))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(authority_id, critical=False)
        .sign(signer, algorithm=None)
    )


def swarm_tag_of(authority: x509.Certificate) -> str:
    """The swarm tag (16 hex digits) that an authority's certificate carries in its name.

    `ValueError` if it has none.
    """
    return swarm_tag_in(authority.subject)


def swarm_tag_in(name: x509.Name) -> str:
    """The swarm tag in an authority's name; `ValueError` if it is no authority's."""
    names = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    text = str(names[0].value) if names else ""
    tag = text.removeprefix(_NAME_PREFIX)
    if not text.startswith(_NAME_PREFIX) or len(tag) != 16 or not set(tag) <= set("0123456789abcdef"):
        raise ValueError("the certificate is not a swarm's authority")
    return tag


def _authority_name(swarm_tag: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME_PREFIX + swarm_tag)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
