"""What only the swarm's authority can say, that is whoever holds the join token, and every member can check.

A statement is a record with a signature by the authority's Ed25519 key over the statement's domain (ASCII, with a
version), a zero byte, and the record's other fields as a msgpack array in their order, in minimal form. The domains
differ from each other, and none can be taken for a certificate, which is DER and begins with the byte 0x30.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from typing import Annotated, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Meta, Struct

from swarmd.transport.authority import authority_key
from swarmd.transport.token import JoinToken

# Far more machines than a person has; whoever evicts more is better served by a new token, which forgets them.
MAX_DENIALS = 512
EVICTED = "evicted from this swarm"

SwarmTag = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
NodeId = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Certificate = Annotated[bytes, Meta(max_length=4096)]
Members = Annotated[tuple[NodeId, ...], Meta(max_length=1024)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]


class StatementError(ValueError):
    """A statement that this swarm's authority has not made, or one too many; the message says which."""


class Denial(Struct, frozen=True, array_like=True):
    """Node `node` is no member any more (`evicted`), or is one again; of one node, the highest `serial` counts.

    `name` is what it called itself, `at` the time in Unix seconds: both for people only.
    """

    swarm: SwarmTag
    node: NodeId
    name: Annotated[str, Meta(max_length=64)]
    at: Count
    serial: Count
    evicted: bool
    signature: Signature

    @property
    def reason(self) -> str:
        """What the node is told, and logs say: "evicted from this swarm on 2026-11-27 at 04:30 UTC"."""
        return f"{EVICTED} on {_date(self.at)}"


class Succession(Struct, frozen=True, array_like=True):
    """The authority of `swarm` names the one that is to follow it, by its certificate (DER); the highest `serial`
    counts.
    """

    swarm: SwarmTag
    authority: Certificate
    serial: Count
    signature: Signature


class Handover(Struct, frozen=True, array_like=True):
    """The authority of `swarm` says that `successor` counts from now on, and who holds certificates of it."""

    swarm: SwarmTag
    successor: SwarmTag
    members: Members
    signature: Signature


Statement = Denial | Succession | Handover
_S = TypeVar("_S", Denial, Succession, Handover)
_DOMAINS: dict[type[Struct], bytes] = {
    Denial: b"swarmd/1 denial",
    Succession: b"swarmd/1 succession",
    Handover: b"swarmd/1 handover",
}


def deny(token: JoinToken, node: str, name: str, at: int, serial: int, *, evicted: bool = True) -> Denial:
    """A denial signed by the authority of a token."""
    shown = "".join(character for character in name if character.isprintable())[:64]
    return signed(Denial(token.swarm_tag, node, shown, at, serial, evicted, bytes(64)), token)


def signed(statement: _S, token: JoinToken) -> _S:
    """The statement with the signature of a token's authority in place of whatever it has."""
    return msgspec.structs.replace(statement, signature=authority_key(token).sign(_signed_bytes(statement)))


def is_signed_by(authority: Ed25519PublicKey, statement: Statement) -> bool:
    """Whether an authority has made a statement."""
    try:
        authority.verify(statement.signature, _signed_bytes(statement))
    except InvalidSignature:
        return False
    return True


def _signed_bytes(statement: Statement) -> bytes:
    fields = [getattr(statement, name) for name in statement.__struct_fields__ if name != "signature"]
    return _DOMAINS[type(statement)] + b"\0" + msgspec.msgpack.encode(fields)


class Denials:
    """The denials that a process knows: verified, the latest of each node, bounded in number. Pure.

    `authorities`: the public key of each authority that counts at present, by swarm tag.
    """

    def __init__(self, authorities: Mapping[str, Ed25519PublicKey]) -> None:
        self._authorities = dict(authorities)
        self._latest: dict[str, Denial] = {}

    def admit(self, denial: Denial) -> bool:
        """Take a denial in; whether it is news. Raises StatementError for one that is forged or beyond the bound."""
        known = self._latest.get(denial.node)
        if known is not None and _rank(denial) <= _rank(known):
            return False
        authority = self._authorities.get(denial.swarm)
        if authority is None:
            raise StatementError("it is of another swarm")
        if not is_signed_by(authority, denial):
            raise StatementError("its signature is not of this swarm's authority")
        if known is None and len(self._latest) >= MAX_DENIALS:
            raise StatementError(f"{MAX_DENIALS} nodes are denied already; `swarmd rotate` forgets them")
        self._latest[denial.node] = denial
        return True

    def trust(self, authorities: Mapping[str, Ed25519PublicKey]) -> None:
        """Other authorities count from now on; what those of before said is forgotten."""
        self._authorities = dict(authorities)
        self._latest = {node: denial for node, denial in self._latest.items() if denial.swarm in authorities}

    @property
    def all(self) -> tuple[Denial, ...]:
        """All of them, those that let a node in again too: a member that was away may know only the eviction."""
        return tuple(self._latest.values())

    @property
    def refused(self) -> dict[str, str]:
        """The nodes that are evicted at present, each with the reason to tell."""
        return {denial.node: denial.reason for denial in self._latest.values() if denial.evicted}

    def get(self, node: str) -> Denial | None:
        """The latest about a node."""
        return self._latest.get(node)

    def next_serial(self, node: str, now_ms: int) -> int:
        """A serial that outranks what is known of a node, also if a clock was set back; `now_ms` in Unix time."""
        known = self._latest.get(node)
        return now_ms if known is None else max(now_ms, known.serial + 1)


def admit_all(denials: Denials, records: Iterable[Denial]) -> tuple[list[Denial], StatementError | None]:
    """What was news among records from elsewhere; the first that is forged ends it, so that a flood costs one check."""
    news: list[Denial] = []
    for record in records:
        try:
            if denials.admit(record):
                news.append(record)
        except StatementError as error:
            return news, error
    return news, None


def _rank(denial: Denial) -> tuple[int, bool, bytes]:
    """Of two with one serial, made in two places, the eviction counts."""
    return denial.serial, denial.evicted, denial.signature


def _date(at: int) -> str:
    try:
        return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%Y-%m-%d at %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return "an unknown date"
