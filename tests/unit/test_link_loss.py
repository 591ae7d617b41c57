"""What a link promises when it goes down, in whatever way."""

import asyncio
import itertools
import socket

import msgspec
import pytest
from support.link_fakes import Count, Note, Recorder, eventually, note, two_nodes, until_blocked

from swarmd.transport.frames import PRELUDE, Envelope, Flow, encode_head
from swarmd.transport.link import Link, LinkClosed


def cut(link: Link) -> None:
    """What a killed process does to its links: no goodbye, no TLS alert."""
    socket.socket.shutdown(link._sock._tls, socket.SHUT_RDWR)


async def write_raw(link: Link, data: bytes) -> None:
    """Bytes that a member would never send, inside the encrypted connection."""
    await link._sock.send_all(data)


def frame(flow: Flow, frame_id: int, body: object) -> bytes:
    return encode_head(Envelope(flow, frame_id, msgspec.Raw(msgspec.msgpack.encode(body))), 0)


async def test_everybody_who_waits_learns_of_the_loss():
    async with two_nodes() as pair:
        near, far = await pair.dial()
        request = asyncio.create_task(near.request(Note("hang"), timeout=None))
        got = []

        async def read() -> None:
            async with near.stream(Count(5), b"") as items:
                async for item in items:
                    got.append(note(item).number)
            async with near.stream(Count(3), b"stay") as items:
                async for item in items:
                    got.append(note(item).number)

        stream = asyncio.create_task(read())
        await eventually(lambda: len(got) == 8)
        cut(far)
        for task in (request, stream):
            with pytest.raises(LinkClosed):
                await task
        await near.wait_closed()
        await pair.far_side.until(lambda: pair.far_side.closed)
        await pair.far_side.until(lambda: pair.far_side.requests_cancelled == 1)
        await pair.far_side.until(lambda: pair.far_side.streams_ended == 2)
        assert len(pair.near_side.closed) == 1
        assert "without a goodbye" in near.close_reason


async def test_a_peer_that_closes_during_a_pending_send():
    async with two_nodes() as pair:
        near, far = await pair.dial()
        pair.far_side.gate.clear()
        sends = [asyncio.create_task(near.send(Note(), bytes(8 << 20))) for _ in range(6)]
        await until_blocked(near)
        assert not sends[-1].done()
        far._break("killed")
        results = await asyncio.gather(*sends, return_exceptions=True)
        assert isinstance(results[-1], LinkClosed)
        await near.wait_closed()
        pair.far_side.gate.set()


async def stuck(pair, near) -> asyncio.Task[None]:
    """Fill the connection until a large frame is half out."""
    pair.far_side.gate.clear()
    await near.send(Note())
    sending = asyncio.create_task(near.send(Note(), bytes(60 << 20)))
    await until_blocked(near)
    assert not sending.done()
    return sending


async def test_cancelling_a_large_frame_half_way_closes_the_link():
    async with two_nodes() as pair:
        near, far = await pair.dial()
        sending = await stuck(pair, near)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert near.closed
        assert "cancelled" in near.close_reason
        pair.far_side.gate.set()
        await far.wait_closed()
        assert "in the middle of a frame" in far.close_reason
        assert len(pair.far_side.messages) == 1


async def test_cancelling_a_frame_that_still_waits_its_turn_harms_nothing():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        sending = await stuck(pair, near)
        for payload in (b"", bytes(100_000)):
            waiting = asyncio.create_task(near.send(Note("withdrawn"), payload))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        pair.far_side.gate.set()
        await sending
        await near.send(Note("last"))
        await pair.far_side.until(lambda: len(pair.far_side.messages) == 3)
        assert pair.far_side.messages[-1][0] == Note("last")


async def test_a_request_given_up_while_the_link_is_stuck_does_not_cost_the_link():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        sending = await stuck(pair, near)
        with pytest.raises(TimeoutError):
            await near.request(Note("plain"), timeout=0.05)
        pair.far_side.gate.set()
        await sending
        assert (await near.request(Note("plain")))[0] == Note("plain")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (PRELUDE.pack(2**31, 0), "header of 2147483648 bytes"),
        (PRELUDE.pack(5, 2**31), "payload of 2147483648 bytes"),
        (PRELUDE.pack(3, 0) + b"\xff\xff\xff", "malformed"),
        (frame(Flow.ONEWAY, 0, {"type": "surprise"}), "unknown or malformed"),
        (frame(Flow.ONEWAY, 0, {"type": "note", "number": "many"}), "unknown or malformed"),
        (frame(Flow.REQUEST, 1, 7), "unknown or malformed"),
        (frame(Flow.HELLO, 0, None), "out of place"),
        (frame(Flow.ERROR, 1, "oops"), "malformed"),
        (frame(Flow.REQUEST, 9, {"type": "note", "text": "hang"}) * 2, "for the second time"),
        (
            frame(Flow.STREAM, 9, {"type": "count", "upto": 1 << 30}) + frame(Flow.CREDIT, 9, 1 << 40),
            "gives back more",
        ),
    ],
)
async def test_a_member_that_breaks_the_protocol_loses_the_link_and_nothing_else(data, says, caplog):
    async with two_nodes() as pair:
        near, far = await pair.dial()
        near._asked._last_id = 9  # so that what comes back is an answer
        await write_raw(near, data)
        await far.wait_closed()
        assert says in far.close_reason
        await near.wait_closed()
        assert says in near.close_reason  # the goodbye names the fault
        assert sum("broke the protocol" in record.message for record in caplog.records) == 1
        again, _ = await pair.dial()
        assert (await again.request(Note("plain")))[0] == Note("plain")


async def read_all(items) -> list[int]:
    return [item.number async for item in items]


async def test_a_stream_beyond_its_window_is_a_breach():
    async with two_nodes() as pair:
        near, far = await pair.dial()
        async with near.stream(Count(0), b"stay") as items:
            item = {"type": "note", "number": 1}
            await write_raw(far, frame(Flow.STREAM_ITEM, 1, item) * 300)
            await near.wait_closed()
            await anext(items)  # what came within the window is given out first
            with pytest.raises(LinkClosed, match="window"):
                await read_all(items)


NOTHING = {"type": "note"}
ANSWERS = ((Flow.REPLY, NOTHING), (Flow.STREAM_ITEM, NOTHING), (Flow.STREAM_END, None), (Flow.ERROR, ["late", "late"]))


async def test_answers_that_nobody_waits_for_any_more_are_late_and_not_wrong():
    async with two_nodes() as pair:
        near, far = await pair.dial()
        await far.request(Note("plain"))
        for flow, body in (*ANSWERS, (Flow.CANCEL, None), (Flow.CREDIT, 5)):
            await write_raw(near, frame(flow, 1, body))
        assert (await near.request(Note("plain")))[0] == Note("plain")
        assert not far.closed


@pytest.mark.parametrize(("flow", "body"), ANSWERS)
async def test_answers_to_what_was_never_asked_end_the_link(flow, body, caplog):
    async with two_nodes() as pair:
        near, far = await pair.dial()
        await far.request(Note("plain"))
        await write_raw(near, frame(flow, 2, body))
        await far.wait_closed()
        assert "never asked" in far.close_reason
        assert sum("broke the protocol" in record.message for record in caplog.records) == 1


async def test_a_peer_that_asks_and_never_reads_loses_the_link():
    async with two_nodes() as pair:
        near, far = await pair.dial()
        near._sock._tls.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        far._sock._tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        pair.near_side.gate.clear()
        await far.send(Note("the receive loop of the near side now waits in its handler"))

        async def ask_for_ever() -> None:
            for i in itertools.count(1):
                await write_raw(near, frame(Flow.REQUEST, i, {"type": "note", "text": "refuse"}))

        with pytest.raises(OSError):
            await ask_for_ever()
        await far.wait_closed()
        assert far.close_reason == "the other side asks more than it reads"
        pair.near_side.gate.set()


async def test_a_handler_may_close_the_link_that_called_it():
    class Doorman(Recorder):
        async def on_message(self, link: Link, message, payload) -> None:
            await link.close("not today")

        async def on_request(self, link: Link, message, payload):
            await link.close("not today either")
            return Note()

    async with two_nodes() as pair:
        pair.far._handler = Doorman()
        near = await pair.near.dial("127.0.0.1", pair.port)
        await near.send(Note())
        await near.wait_closed()
        assert near.close_reason == "the other side closed the link: not today"
        near = await pair.near.dial("127.0.0.1", pair.port)
        with pytest.raises(LinkClosed, match="not today either"):
            await near.request(Note())


async def test_a_handler_that_never_returns_cannot_hold_up_a_close():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        pair.far_side.gate.clear()
        await near.send(Note())
        far = pair.far_side.links[0]
        async with asyncio.timeout(5):
            await far.close("enough")
        assert len(pair.far_side.closed) == 1


async def test_closing_twice_and_at_once_from_both_sides():
    async with two_nodes() as pair:
        near, far = await pair.dial()
        async with asyncio.timeout(5):
            await asyncio.gather(near.close("a"), near.close("b"), far.close("c"))
        assert near.closed
        assert far.closed
        assert len(pair.near_side.closed) == len(pair.far_side.closed) == 1


async def test_nothing_is_left_on_the_loop():
    loop = asyncio.get_running_loop()
    before = asyncio.all_tasks()
    async with two_nodes() as pair:
        for _ in range(3):
            near, far = await pair.dial()
            descriptor = near._sock._tls.fileno()
            cut(far)
            await near.wait_closed()
            assert not loop.remove_reader(descriptor)
            assert not loop.remove_writer(descriptor)
    assert asyncio.all_tasks() == before
