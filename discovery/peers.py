"""Peers named by a person: `--peer host[:port]` and the peers line of the config file."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from typing import NamedTuple

_MAX_RESOLVED = 16
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_.-]{1,253}")


class PeerAddress(NamedTuple):
    """Where a peer listens for links: an address literal or a DNS name, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_peer(text: str, default_port: int) -> PeerAddress:
    """Read ``host``, ``host:port``, ``[v6]``, ``[v6]:port`` or a bare IPv6 address.

    Raises `ValueError` with a sentence that says what is wrong and how a peer is written.
    """
    text = text.strip()
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", text)
    if bracketed:
        host, port_text = bracketed[1], bracketed[2]
        if not _is_ipv6(host):
            raise ValueError(f"peer {text!r}: {host!r} in brackets is not an IPv6 address")
    elif _is_ipv6(text):
        host, port_text = text, None
    else:
        host, colon, rest = text.partition(":")
        port_text = rest if colon else None
        if _HOST_NAME.fullmatch(host) is None:
            raise ValueError(f"peer {text!r} has no usable host; write host:port, or [IPv6 address]:port")
    return PeerAddress(host, default_port if port_text is None else _parse_port(text, port_text))


async def resolve(peer: PeerAddress) -> list[tuple[str, int]]:
    """Every (address, port) of a peer, at most 16, resolved afresh on each call.

    Raises `OSError` with a sentence that names the host if it has no address at present.
    """
    loop = asyncio.get_running_loop()
    try:
        infos = await loop.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        code = error.errno if isinstance(error, OSError) else None
        raise OSError(
            code, f"the peer {peer.host} cannot be resolved; check its spelling, or give its address"
        ) from error
    found = dict.fromkeys((_with_scope(info[4]), peer.port) for info in infos)
    return list(found)[:_MAX_RESOLVED]


def _with_scope(address: tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]) -> str:
    host = str(address[0])
    if len(address) == 4 and address[3] and "%" not in host:
        host = f"{host}%{address[3]}"
    return host


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _parse_port(text: str, port_text: str) -> int:
    if re.fullmatch(r"[0-9]{1,5}", port_text) is None or not 1 <= int(port_text) <= 65535:
        raise ValueError(f"peer {text!r}: the port must be a number from 1 to 65535")
    return int(port_text)
