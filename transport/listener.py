"""Listening sockets: bound on every address asked for, accepted without ever letting strangers pile up."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Awaitable, Callable

log = logging.getLogger("swarmd.transport")

# Handshakes in progress. One takes milliseconds, so whoever is the oldest of so many is not a node.
MAX_HANDSHAKES = 128
_BACKLOG = 128
_PAUSE_SECONDS = 1.0
_PORT_ATTEMPTS = 16

Greeter = Callable[[socket.socket], Awaitable[None]]


class Listener:
    """Accepts connections and runs `greet` on each in a task, at most `MAX_HANDSHAKES` at a time.

    When one more comes, the oldest is cancelled: strangers who hold connections open in silence cannot keep a
    node out.
    """

    def __init__(self, greet: Greeter):
        self._greet = greet
        self._sockets: list[socket.socket] = []
        self._greetings: dict[asyncio.Task[None], None] = {}  # in order of arrival
        self._resume: dict[socket.socket, asyncio.TimerHandle] = {}

    @property
    def greetings(self) -> int:
        """Connections that are in their handshake now."""
        return len(self._greetings)

    async def listen(self, host: str | None, port: int) -> int:
        """Listen on `host` (None: every IPv4 and IPv6 address); the port bound, which 0 leaves to the system.

        Raises `OSError` with a sentence that names the address and the remedy.
        """
        try:
            sockets = await _bind(host, port)
        except OSError as error:
            raise OSError(error.errno, _explain_bind(error, host, port)) from error
        loop = asyncio.get_running_loop()
        for sock in sockets:
            sock.listen(_BACKLOG)
            self._sockets.append(sock)
            loop.add_reader(sock.fileno(), self._accept, sock)
        return sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening and drop the handshakes in progress."""
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            loop.remove_reader(sock.fileno())
            sock.close()
        self._sockets.clear()
        for timer in self._resume.values():
            timer.cancel()
        self._resume.clear()
        greetings = list(self._greetings)
        for task in greetings:
            task.cancel()
        await asyncio.gather(*greetings, return_exceptions=True)

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError as error:
            # Out of descriptors or memory: the pending connection stays readable, so listening on would spin.
            log.warning("cannot accept connections for a moment: %s", error.strerror)
            self._pause(listening)
            return
        while len(self._greetings) >= MAX_HANDSHAKES:
            oldest = next(iter(self._greetings))
            del self._greetings[oldest]
            oldest.cancel()
        task = asyncio.ensure_future(self._greet(sock))
        self._greetings[task] = None
        task.add_done_callback(lambda done: self._greetings.pop(done, None))

    def _pause(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening.fileno())

        def resume() -> None:
            del self._resume[listening]
            loop.add_reader(listening.fileno(), self._accept, listening)

        self._resume[listening] = loop.call_later(_PAUSE_SECONDS, resume)


async def _bind(host: str | None, port: int) -> list[socket.socket]:
    """Sockets bound to every address of `host` on one port. Port 0: one that is free on all of them."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = sorted({(info[0], info[4]) for info in infos})
    for attempt in range(_PORT_ATTEMPTS):
        sockets: list[socket.socket] = []
        try:
            for family, address in addresses:
                chosen = port or (sockets[0].getsockname()[1] if sockets else 0)
                with contextlib.suppress(_FamilyMissingError):
                    sockets.append(_bind_one(family, (address[0], chosen, *address[2:])))
        except OSError as error:
            for sock in sockets:
                sock.close()
            if port or error.errno != errno.EADDRINUSE or attempt == _PORT_ATTEMPTS - 1:
                raise
        else:
            if sockets:
                return sockets
            raise OSError(errno.EADDRNOTAVAIL, "no address to listen on")
    raise OSError(errno.EADDRINUSE, "no port is free on every address")


class _FamilyMissingError(Exception):
    """This machine has no IPv6 (or no IPv4)."""


def _bind_one(family: int, address: tuple[object, ...]) -> socket.socket:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise _FamilyMissingError from error
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRNOTAVAIL and address[0] in ("::", "::1"):
            raise _FamilyMissingError from error
        raise
    return sock


def _explain_bind(error: OSError, host: str | None, port: int) -> str:
    where = f"port {port}" if host is None else f"{host} port {port}"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is already in use; choose another with --port, or stop the program that has it"
    if error.errno == errno.EACCES:
        return f"{where} may not be used by this user; choose one above 1023 with --port"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine; leave it out to listen on all"
    return f"cannot listen on {where}: {error.strerror or error}"
