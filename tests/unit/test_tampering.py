"""What reaches a link that its other end did not send, or should not have: each ends that link with one line in the log
of each end, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from support.link_fakes import Count, Note, Pair, eventually, two_nodes
from support.relay import Relay, Way, relay_to

from swarmd.transport.endpoint import LinkRefused
from swarmd.transport.frames import Envelope, Flow, encode_head
from swarmd.transport.link import Link, LinkClosed

NOTE = {"type": "note"}


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says to people."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO and r.name.startswith("swarmd")]


async def serves_as_before(pair: Pair) -> None:
    """A link of its own comes about, and carries."""
    link, _ = await pair.dial()
    assert (await link.request(Note("plain")))[0] == Note("plain")
    assert sum(not known.closed for known in pair.far.links) == 1
    assert pair.far.handshakes == 0
    assert pair.far_side.requests_hanging == pair.far_side.requests_cancelled


async def dial_through(pair: Pair, relay: Relay) -> Link:
    return await pair.near.dial("127.0.0.1", relay.port, expect=pair.far.node_id)


# Places in the first bytes of each side: a TLS record's type, version, length, then the hello within it; far behind,
# certificates and signatures, which are encrypted already.
HANDSHAKE_PLACES = (0, 1, 3, 5, 11, 43, 60, 90, 140, 300, 500)


@pytest.mark.parametrize("way", ["to", "from"])
@pytest.mark.parametrize("place", HANDSHAKE_PLACES)
async def test_a_flipped_bit_in_the_handshake(way: Way, place: int, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    async with two_nodes(handshake_seconds=2) as pair, relay_to(pair.port) as relay:
        relay.flip(way, place)
        with pytest.raises(LinkRefused):
            await pair.near.dial("127.0.0.1", relay.port, expect=pair.far.node_id, timeout=3)
        await eventually(lambda: not pair.far.handshakes)
        said = lines(caplog)
        assert sum(line.startswith("no link to 127.0.0.1") for line in said) == 1
        assert sum(line.startswith("refused a connection from 127.0.0.1") for line in said) <= 1
        assert len(said) <= 2
        assert not pair.far_side.links
        await serves_as_before(pair)


async def until_down(link: Link, send: Callable[[], Any]) -> None:
    """What was changed may lie in wait until more bytes come: a length, for example."""
    async with asyncio.timeout(10):
        while not link.closed:
            with contextlib.suppress(LinkClosed, TimeoutError):
                await send()
        await link.wait_closed()


@pytest.mark.parametrize("way", ["to", "from"])
@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 5, 20, 30])
async def test_a_flipped_bit_in_what_a_link_carries(way: Way, place: int, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    async with two_nodes() as pair, relay_to(pair.port) as relay:
        near = await dial_through(pair, relay)
        await near.request(Note("plain"))
        far = pair.far_side.links[-1]
        relay.flip(way, place)
        await until_down(near, lambda: near.request(Note("x" * 3000), timeout=0.2))
        await far.wait_closed()
        said = lines(caplog)
        assert [line for line in said if "were changed on the way" in line]
        assert len(said) <= 2, "one of each end"
        assert pair.far_side.messages == []
        await serves_as_before(pair)


CHANGES: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "a record twice": (lambda data: data * 2, "were changed on the way"),
    "a record lost": (lambda data: b"", "were changed on the way"),
    "another record": (lambda data: b"\x17\x03\x03\x00\x20" + bytes(32) + data, "were changed on the way"),
    "plain text": (lambda data: b"GET / HTTP/1.1\r\n\r\n" + data, "were changed on the way"),
    "half of a record, and the end": (lambda data: data[: len(data) // 2], "was lost"),
    "the end": (lambda data: None, "was lost"),
}


@pytest.mark.parametrize("way", ["to", "from"])
@pytest.mark.parametrize("change", CHANGES)
async def test_what_somebody_in_between_can_do_with_records(way: Way, change: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    act, says = CHANGES[change]
    async with two_nodes() as pair, relay_to(pair.port) as relay:
        near = await dial_through(pair, relay)
        await near.request(Note("plain"))
        far = pair.far_side.links[-1]
        relay.once(way, act)
        if "half" in change:
            relay_cut = relay._changes[way]

            def half_then_end(data: bytes) -> bytes | None:
                half = relay_cut(data)
                relay._changes[way] = lambda _: None
                return half

            relay._changes[way] = half_then_end
        await until_down(near, lambda: near.request(Note("plain"), timeout=0.2))
        await far.wait_closed()
        said = lines(caplog)
        assert [line for line in said if says in line], said
        assert len(said) <= 2, said
        await serves_as_before(pair)


async def test_a_stream_that_ends_in_the_middle_of_a_frame(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    async with two_nodes() as pair, relay_to(pair.port) as relay:
        near = await dial_through(pair, relay)
        far = pair.far_side.links[-1]
        passed = 0

        def cut(data: bytes) -> bytes | None:
            nonlocal passed
            passed += len(data)
            return data if passed < 200_000 else None

        relay._changes["to"] = cut
        with pytest.raises(LinkClosed):
            await near.request(Note("plain"), bytes(8 << 20))
        await far.wait_closed()
        assert "in the middle of a frame" in far.close_reason
        assert sum("in the middle of a frame" in line for line in lines(caplog)) == 1
        assert pair.far_side.messages == []
        await serves_as_before(pair)


async def test_a_whole_connection_played_again(caplog: pytest.LogCaptureFixture):
    """Every byte that one side sent, recorded and sent once more: the handshake does not fit this time's."""
    caplog.set_level(logging.INFO)
    async with two_nodes() as pair, relay_to(pair.port) as relay:
        near = await dial_through(pair, relay)
        await near.send(Note("pay"))
        await pair.far_side.until(lambda: len(pair.far_side.messages) == 1)
        await near.close("done")
        known = len(pair.far_side.links)
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.port)
        writer.write(bytes(relay.seen["to"]))
        async with asyncio.timeout(10):
            while await reader.read(4096):
                pass
        writer.close()
        await eventually(lambda: not pair.far.handshakes)
        assert len(pair.far_side.links) == known
        assert len(pair.far_side.messages) == 1
        assert sum(line.startswith("refused a connection") for line in lines(caplog)) == 1
        await serves_as_before(pair)


def frame(flow: Flow, frame_id: int, body: object, payload: bytes = b"") -> bytes:
    return encode_head(Envelope(flow, frame_id, msgspec.Raw(msgspec.msgpack.encode(body))), len(payload)) + payload


REQUEST = frame(Flow.REQUEST, 9, {"type": "note", "text": "hang"})
STREAM = frame(Flow.STREAM, 9, {"type": "count", "upto": 3})
FRAMES: dict[str, tuple[bytes, str]] = {
    "a request again": (REQUEST * 2, "for the second time"),
    "a request again when it has been answered": (frame(Flow.REQUEST, 9, NOTE) * 2, "for the second time"),
    "a stream again": (STREAM * 2, "for the second time"),
    "a stream under a request's id": (REQUEST + STREAM, "for the second time"),
    "an id below those before": (REQUEST + frame(Flow.REQUEST, 8, NOTE), "for the second time"),
    "an id of 0": (frame(Flow.REQUEST, 0, NOTE), "for the second time"),
    "a reply to nothing": (frame(Flow.REPLY, 7, NOTE), "never asked"),
    "a chunk to nothing": (frame(Flow.REPLY, 7, NOTE, bytes(1 << 20)), "never asked"),
    "an item of nothing": (frame(Flow.STREAM_ITEM, 7, NOTE), "never asked"),
    "the end of nothing": (frame(Flow.STREAM_END, 7, None), "never asked"),
    "an error of nothing": (frame(Flow.ERROR, 7, ["busy", "no"]), "never asked"),
    "more credit than items": (
        frame(Flow.STREAM, 9, {"type": "count", "upto": 1 << 30}) + frame(Flow.CREDIT, 9, 1 << 40),
        "gives back more",
    ),
    "credit of less than nothing": (
        frame(Flow.STREAM, 9, {"type": "count", "upto": 1 << 30}) + frame(Flow.CREDIT, 9, -1),
        "gives back more",
    ),
    "credit that is no number": (STREAM + frame(Flow.CREDIT, 9, "1"), "malformed"),
    "a second hello": (frame(Flow.HELLO, 0, None), "out of place"),
    "a message of another vocabulary": (frame(Flow.ONEWAY, 0, {"type": "stage.stop"}), "unknown or malformed"),
    "an id above all": (b"\0\0\0\x0c\0\0\0\0\x93\x02\xcf" + b"\xff" * 8 + b"\x80", "malformed"),
}


@pytest.mark.parametrize("what", FRAMES)
async def test_frames_that_a_member_should_not_send(what: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    data, says = FRAMES[what]
    async with two_nodes() as pair:
        near, far = await pair.dial()
        near._asked._last_id = 9  # so that what comes back is an answer
        await near._sock.send_all(data)
        await far.wait_closed()
        assert says in far.close_reason
        [line] = lines(caplog)
        assert "broke the protocol" in line
        assert says in line
        await pair.far_side.until(lambda: pair.far_side.requests_hanging == pair.far_side.requests_cancelled)
        await serves_as_before(pair)


async def test_a_flood_of_breaches_is_one_line_in_ten_seconds(caplog: pytest.LogCaptureFixture):
    async with two_nodes() as pair:
        for _ in range(20):
            near, far = await pair.dial()
            await near._sock.send_all(frame(Flow.REPLY, 7, NOTE))
            await far.wait_closed()
            await near.wait_closed()
        assert sum("broke the protocol" in line for line in lines(caplog)) == 1
        await serves_as_before(pair)


async def test_items_beyond_the_window_end_the_link_and_not_the_memory(caplog: pytest.LogCaptureFixture):
    async with two_nodes() as pair:
        near, far = await pair.dial()
        async with near.stream(Count(0), b"stay"):
            await far._sock.send_all(frame(Flow.STREAM_ITEM, 1, NOTE) * 300)
            await near.wait_closed()
        assert "window" in near.close_reason
        assert sum("broke the protocol" in line for line in lines(caplog)) == 1
        await serves_as_before(pair)
