"""A recording handler and two connected endpoints on loopback, for tests of the transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct

from swarmd.transport.endpoint import Endpoint
from swarmd.transport.identity import Credentials, issue_credentials
from swarmd.transport.link import PROTOCOL_VERSION, Hello, Link, RemoteError, Vocabulary
from swarmd.transport.token import JoinToken


class Note(Struct, frozen=True, tag="note"):
    text: str = ""
    number: int = 0


class Count(Struct, frozen=True, tag="count"):
    upto: int


VOCABULARY = Vocabulary((Note, Count))


def new_credentials(token: JoinToken) -> Credentials:
    return issue_credentials(Ed25519PrivateKey.generate(), token)


def hello(name: str = "node", protocol: int = PROTOCOL_VERSION) -> Hello:
    return Hello(protocol=protocol, role="daemon", name=name, version="0.1.0")


class Recorder:
    """Records what happens on its links; `gate` holds back one-way messages until it is set."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.closed: list[tuple[Link, str]] = []
        self.messages: list[tuple[Struct, bytearray]] = []
        self.changed = asyncio.Condition()
        self.gate = asyncio.Event()
        self.gate.set()
        self.streams_ended = 0
        self.requests_hanging = 0
        self.requests_cancelled = 0

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def until(self, condition: Callable[[], object], seconds: float = 10) -> None:
        async with asyncio.timeout(seconds), self.changed:
            await self.changed.wait_for(lambda: bool(condition()))

    async def on_link(self, link: Link) -> None:
        self.links.append(link)
        await self._tell()

    async def on_message(self, link: Link, message: Struct, payload: bytearray) -> None:
        await self.gate.wait()
        self.messages.append((message, payload))
        await self._tell()

    async def on_request(self, link: Link, message: Struct, payload: bytearray) -> Any:
        if not isinstance(message, Note):
            raise RemoteError("unknown", "only notes are answered")
        match message.text:
            case "refuse":
                raise RemoteError("teapot", "short and stout")
            case "crash":
                raise KeyError("a secret detail")
            case "hang":
                self.requests_hanging += 1
                await self._tell()
                try:
                    await asyncio.Event().wait()
                finally:
                    self.requests_cancelled += 1
                    await self._tell()
            case "spontaneous":
                raise asyncio.CancelledError
            case "plain":
                return Note("plain")
        return Note(message.text, len(payload)), payload

    async def on_stream(self, link: Link, message: Struct, payload: bytearray) -> AsyncIterator[Struct]:
        assert isinstance(message, Count)
        try:
            for number in range(message.upto):
                if number == 13 and payload:
                    raise RemoteError("unlucky", "thirteen")
                yield Note(number=number)
            if payload == b"stay":
                await asyncio.Event().wait()
        finally:
            self.streams_ended += 1
            await self._tell()

    async def on_closed(self, link: Link, reason: str) -> None:
        self.closed.append((link, reason))
        await self._tell()


class Pair:
    """Two nodes of one swarm with a link between them: `near` dialled `far`."""

    def __init__(self, near: Endpoint, far: Endpoint, port: int, near_side: Recorder, far_side: Recorder):
        self.near, self.far, self.port = near, far, port
        self.near_side, self.far_side = near_side, far_side

    async def dial(self) -> tuple[Link, Link]:
        known = len(self.far_side.links)
        link = await self.near.dial("127.0.0.1", self.port, expect=self.far.node_id)
        await self.far_side.until(lambda: len(self.far_side.links) > known)
        return link, self.far_side.links[-1]


@asynccontextmanager
async def endpoint(credentials: Credentials, recorder: Recorder, name: str = "node", **options: Any):
    protocol = options.pop("protocol", PROTOCOL_VERSION)
    made = Endpoint(credentials, VOCABULARY, recorder, hello=lambda: hello(name, protocol), **options)
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def two_nodes(**options: Any) -> AsyncIterator[Pair]:
    token = JoinToken.generate()
    near_side, far_side = Recorder(), Recorder()
    async with (
        endpoint(new_credentials(token), far_side, "far", **options) as far,
        endpoint(new_credentials(token), near_side, "near", **options) as near,
    ):
        yield Pair(near, far, await far.listen("127.0.0.1", 0), near_side, far_side)


async def until_blocked(link: Link, seconds: float = 10) -> None:
    """Wait until a send on `link` waits for the network, because the other side does not read."""
    await eventually(lambda: link._sock._writable._waiters, seconds)


async def eventually(condition: Callable[[], object], seconds: float = 10) -> None:
    """Let the loop run until `condition` holds, for what announces itself by no event."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


def note(message: Struct) -> Note:
    """`message`, which must be a note."""
    assert isinstance(message, Note)
    return message
