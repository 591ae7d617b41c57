"""Somebody between two processes who sees every byte of their connections, and changes what a test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal

Way = Literal["to", "from"]
"""From the one who dialled, to the one who listens; and back."""
Change = Callable[[bytes], bytes | None]
"""What becomes of bytes that pass; None ends the connection."""


class Relay:
    """Listens on `port` and passes on to another port of this machine. `seen` are all bytes of each way, unchanged."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._changes: dict[Way, Change] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.seen: dict[Way, bytearray] = {"to": bytearray(), "from": bytearray()}
        self.port = 0

    def flip(self, way: Way, place: int, bit: int = 0) -> None:
        """Flip one bit of the byte at `place` of those that are yet to pass."""
        passed = 0

        def change(data: bytes) -> bytes:
            nonlocal passed
            here = place - passed
            passed += len(data)
            if not 0 <= here < len(data):
                return data
            return data[:here] + bytes([data[here] ^ 1 << bit]) + data[here + 1 :]

        self._changes[way] = change

    def once(self, way: Way, change: Change) -> None:
        """Change what passes next."""

        def first(data: bytes) -> bytes | None:
            del self._changes[way]
            return change(data)

        self._changes[way] = first

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._target)
        both = (self._pass("to", reader, other_writer), self._pass("from", other_reader, writer))
        tasks = [asyncio.ensure_future(one) for one in both]
        self._tasks.update(tasks)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(tasks, timeout=2)
        for task in tasks:
            task.cancel()
            self._tasks.discard(task)
        for one in (writer, other_writer):
            one.close()

    async def _pass(self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                self.seen[way] += data
                changed = self._changes[way](data) if way in self._changes else data
                if changed is None:
                    writer.transport.abort()
                    return
                writer.write(changed)
                await writer.drain()
            writer.write_eof()


@asynccontextmanager
async def relay_to(port: int) -> AsyncIterator[Relay]:
    """A relay in front of a port."""
    relay = Relay(port)
    server = await asyncio.start_server(relay._on_connection, "127.0.0.1", 0)
    relay.port = server.sockets[0].getsockname()[1]
    try:
        yield relay
    finally:
        server.close()
        for task in relay._tasks:
            task.cancel()
