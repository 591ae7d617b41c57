"""Targets: what peers send over links."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from random import Random
from typing import Any, cast

import msgspec
from fuzz.engine import Target
from fuzz.mutate import mutate
from fuzz.trees import Sampler, change, junk, to_msgpack

from swarmd.node.cluster.messages import DAEMON_MESSAGES, Heartbeat, HeartbeatEcho, Manifest
from swarmd.node.models.errors import ModelFileError
from swarmd.node.serving.messages import DATA_MESSAGES
from swarmd.transport.frames import HELLO_LIMITS, PRELUDE, Flow, FrameDecoder, FrameError, Limits
from swarmd.transport.handshake import Introduction
from swarmd.transport.link import Hello, Link, RemoteError, RemoteStream, Vocabulary
from swarmd.transport.messages import ErrorBody, decode_body, decode_hello
from swarmd.transport.tls_socket import TlsSocket

VOCABULARIES = (Vocabulary(DATA_MESSAGES), Vocabulary(DAEMON_MESSAGES))
SMALL = Limits(header=64 << 10, payload=256 << 10)
_MESSAGE_FLOWS = (Flow.ONEWAY, Flow.REQUEST, Flow.REPLY, Flow.STREAM, Flow.STREAM_ITEM)
_SAMPLER = Sampler()


def body_for(random: Random, flow: Flow, classes: tuple[type, ...] = DAEMON_MESSAGES) -> bytes:
    """A body that the flow may carry."""
    if flow in _MESSAGE_FLOWS:
        return to_msgpack(_SAMPLER.message(random, random.choice(classes)))
    if flow == Flow.HELLO:
        return to_msgpack(_SAMPLER.message(random, Hello))
    if flow == Flow.ERROR:
        return to_msgpack(_SAMPLER.message(random, ErrorBody))
    if flow == Flow.CREDIT:
        return to_msgpack(random.choice((1, 128, 255, 256, 0, -1, 1 << 40)))
    return to_msgpack("bye" if flow == Flow.GOODBYE else None)


def frame_for(random: Random, flow: Flow | int, body: bytes, payload: bytes = b"") -> bytes:
    """A whole frame with an id out of a few."""
    frame_id = random.choice((0, 1, 2, 3, 4, 5, random.randrange(400), 2**62))
    header = to_msgpack([int(flow), frame_id, msgspec.Raw(body)])
    return PRELUDE.pack(len(header), len(payload)) + header + payload


def some_frames(random: Random) -> bytes:
    """Some frames in a row, mostly sound each by itself."""
    frames = []
    for _ in range(random.choice((1, 1, 2, 3, 8))):
        flow = random.choice(tuple(Flow)[1:])
        payload = random.randbytes(random.choice((0, 0, 0, 3, 300)))
        frames.append(frame_for(random, flow, body_for(random, flow), payload) * random.choice((1, 1, 1, 2, 300)))
    return b"".join(frames)


class Frames(Target):
    """The codec: any bytes in any pieces, under the limits before and after the hello."""

    name = "frames"
    errors = (FrameError,)
    memory = SMALL.header + SMALL.payload + (192 << 10)
    share = 3.0

    def seeds(self) -> list[bytes]:
        random = Random(0)
        return [
            b"\0" + frame_for(random, flow, body_for(random, flow), bytes(size)) for flow in Flow for size in (0, 40)
        ] + [bytes([n]) + some_frames(random) for n in range(8)]

    def run(self, data: bytes) -> str:
        how = data[0] if data else 0
        limits = HELLO_LIMITS if how & 1 else SMALL
        decoder, data = FrameDecoder(limits), data[1:]
        sizes = ((1 << 20,), (1, 7, 300), (4096, 8, 1), (64,))[how >> 1 & 3]
        position = count = 0
        while True:
            while (frame := decoder.next_frame()) is not None:
                count += 1
                assert len(frame.payload) <= limits.payload
                if frame.envelope.flow == Flow.HELLO:
                    decode_hello(frame.envelope.body)
            if position >= len(data):
                return f"{min(count, 9)} frames, {'in' if decoder.in_frame else 'between'}"
            view = decoder.buffer()
            assert len(view) > 0
            size = min(sizes[position % len(sizes)], len(view), len(data) - position)
            view[:size] = data[position : position + size]
            decoder.advance(size)
            position += size


class Messages(Target):
    """Bodies of both vocabularies and of the protocol's own records. A message that is read survives a round trip."""

    name = "messages"
    errors = (FrameError, ModelFileError)
    share = 3.0

    def seeds(self) -> list[bytes]:
        random = Random(1)
        return [
            to_msgpack(_SAMPLER.message(random, kind))
            for kind in (*DAEMON_MESSAGES, Hello, ErrorBody)
            for _ in range(3)
        ]

    def make(self, random: Random, pool: list[bytes]) -> bytes:
        if random.random() < 0.25:
            return mutate(random, random.choice(pool), random.choice(pool))
        value = _SAMPLER.message(random, random.choice(DAEMON_MESSAGES))
        for _ in range(random.randrange(3)):
            value = change(random, value)
        return to_msgpack(value)

    def run(self, data: bytes) -> str:
        outcome, refusal = "", None
        for vocabulary in VOCABULARIES:
            try:
                message = vocabulary.decode(msgspec.Raw(data))
            except FrameError as error:
                refusal = error
                continue
            again = vocabulary.encode(message)
            assert vocabulary.encode(vocabulary.decode(again)) == again
            if isinstance(message, Manifest):
                self._check(message)
            outcome = type(message).__name__
        for kind in (ErrorBody, int, str):
            try:
                decode_body(msgspec.Raw(data), kind)
            except FrameError:
                continue
        if not outcome and refusal is not None:
            raise refusal
        return outcome

    def _check(self, message: Manifest) -> None:
        manifest = message.manifest.check()
        assert 0 < manifest.n_chunks * 16 == len(manifest.chunks)
        assert all(0 < manifest.chunk_length(index) <= manifest.chunk_size for index in range(manifest.n_chunks))
        manifest.chunks_of(manifest.head_ranges)


class _Wire:
    """In place of a `TlsSocket`: gives `data` in pieces, then the end; what is sent is dropped."""

    remote_address = local_address = ("127.0.0.1", 1)

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self.closed = False

    def recv_now(self, view: memoryview) -> int:
        if self.closed:
            raise ConnectionAbortedError("closed")
        count = min(len(view), len(self._data))
        view[:count] = self._data[:count]
        self._data = self._data[count:]
        return count

    def charge(self, count: int) -> bool:
        return False

    def send_now(self, data: bytes | memoryview) -> int:
        return len(data)

    async def send_all(self, data: bytes | memoryview) -> None:
        await asyncio.sleep(0)

    async def breathe(self, count: int) -> None:
        """Nothing is owed."""

    def end_sending(self) -> None:
        """Nobody reads."""

    def close(self) -> None:
        self.closed = True


class _Handler:
    """Answers some requests at once and others never, like a node that works."""

    async def on_link(self, link: Link) -> None:
        pass

    def on_message(self, link: Link, message: msgspec.Struct, payload: bytearray) -> None:
        pass

    async def on_request(self, link: Link, message: msgspec.Struct, payload: bytearray) -> msgspec.Struct:
        if isinstance(message, Heartbeat):
            await asyncio.Event().wait()
        if isinstance(message, HeartbeatEcho):
            raise RemoteError("no", "not now")
        return message

    async def on_stream(self, link: Link, message: msgspec.Struct, payload: bytearray) -> AsyncIterator[msgspec.Struct]:
        for number in range(600):
            yield Heartbeat(number)

    async def on_closed(self, link: Link, reason: str) -> None:
        pass


class Links(Target):
    """A whole link without its socket: requests, streams, windows, bounds; and nothing is left when it is down."""

    name = "link"
    share = 0.3
    memory = 4 << 20
    memory_per_byte = 512

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._on_loop_error)
        self._troubles: list[str] = []
        self._log = _Listener(self._troubles)

    def seeds(self) -> list[bytes]:
        logging.getLogger("swarmd").addHandler(self._log)
        return [some_frames(Random(number)) for number in range(60)]

    def make(self, random: Random, pool: list[bytes]) -> bytes:
        kind = random.random()
        if kind < 0.4:
            return some_frames(random)
        if kind < 0.6:
            return some_frames(random) + random.choice(pool)
        if kind < 0.75:
            value = change(random, msgspec.msgpack.decode(body_for(random, Flow.ONEWAY)))
            return some_frames(random) + frame_for(random, random.choice(_MESSAGE_FLOWS), to_msgpack(value))
        if kind < 0.85:
            return frame_for(random, random.choice(tuple(Flow)), to_msgpack(junk(random)))
        return mutate(random, random.choice(pool), some_frames(random))

    def run(self, data: bytes) -> str:
        self._troubles.clear()
        outcome = self._loop.run_until_complete(self._drive(data))
        assert not self._troubles, self._troubles[0]
        return outcome

    def close(self) -> None:
        logging.getLogger("swarmd").removeHandler(self._log)
        self._loop.close()

    async def _drive(self, data: bytes) -> str:
        breaches: list[Exception] = []
        wire = _Wire(data)
        hello = Hello(1, "daemon", "fuzz", "0")
        link = Link(
            cast(TlsSocket, wire),
            Introduction("0" * 64, hello, FrameDecoder(SMALL)),
            VOCABULARIES[1],
            _Handler(),
            initiator=True,
            on_breach=lambda _, error: breaches.append(error),
        )
        asked: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(link.request(Heartbeat(n), timeout=None)) for n in range(2)
        ]
        asked += [asyncio.ensure_future(self._read(link.stream(Heartbeat(n)))) for n in range(2)]
        await asyncio.sleep(0)
        await link.start()
        await link.wait_closed()
        assert wire.closed
        assert len(breaches) <= 1
        answered = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(item, Exception | tuple | int) for item in answered)
        if left := [task for task in asyncio.all_tasks() if task.get_name().startswith("link")]:
            assert not (await asyncio.wait(left, timeout=10))[1], left
        assert len(link._answering._tasks) == link._answering._bytes == len(link._answering._windows) == 0
        return _kind_of(link.close_reason)

    async def _read(self, stream: RemoteStream) -> int:
        count = 0
        async with stream as items:
            async for _ in items:
                count += 1
        return count

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._troubles.append(f"the loop: {context.get('message')} {context.get('exception')!r}")


class _Listener(logging.Handler):
    """Errors in the log are handlers that failed: no input may bring that about."""

    def __init__(self, troubles: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._troubles = troubles

    def emit(self, record: logging.LogRecord) -> None:
        self._troubles.append(f"the log: {record.getMessage()} {record.exc_info and record.exc_info[1]!r}")


def _kind_of(reason: str) -> str:
    return "".join(character for character in reason.partition(" - at")[0] if not character.isdigit())[:60]
