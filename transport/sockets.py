"""Names to addresses, and addresses to connections, in the event loop."""

from __future__ import annotations

import asyncio
import socket

from swarmd.transport.handshake import LinkRefused
from swarmd.transport.messages import one_line

MAX_RESOLVED = 8


async def resolve(host: str, port: int) -> list[tuple[int, tuple[object, ...]]]:
    """The socket addresses (family, address) of a host, eight at most; without a thread when it is a literal address.

    Raises `LinkRefused` where there is none.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        try:
            infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise LinkRefused(
                f"the name {one_line(host, 100)} cannot be resolved; check its spelling, or use the address"
            ) from error
    except (UnicodeError, OverflowError) as error:
        raise LinkRefused(f"{one_line(host, 100)} port {port} is not an address") from error
    if not infos:
        raise LinkRefused(f"the name {one_line(host, 100)} has no address")
    return [(info[0], info[4]) for info in infos[:MAX_RESOLVED]]


async def connect(family: int, address: tuple[object, ...]) -> socket.socket:
    """A connection, not blocking. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock
