"""What a link promises while it is up, over real sockets on loopback."""

import asyncio
import hashlib
import os
import socket

import pytest
from support.link_fakes import Count, Note, Recorder, note, two_nodes, until_blocked

from swarmd.transport import exchanges
from swarmd.transport.frames import MAX_PAYLOAD, FrameError
from swarmd.transport.link import Hello, Link, LinkClosed, RemoteError, Vocabulary
from swarmd.transport.streams import STREAM_WINDOW


async def test_both_sides_know_each_other():
    async with two_nodes() as pair:
        near, far = await pair.dial()
        assert near.peer_id == pair.far.node_id
        assert far.peer_id == pair.near.node_id
        assert (near.peer.name, far.peer.name) == ("far", "near")
        assert near.initiator
        assert not far.initiator
        assert near.remote_address == far.local_address == ("127.0.0.1", pair.port)
        assert pair.near.links == (near,)


async def test_messages_arrive_in_order_small_and_large_mixed():
    sizes = [0, 1, 16_384, 16_385, 300_000, 5, 2_000_000, 0, 40_000] * 4
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        sends = [near.send(Note(number=i), bytes([i]) * size) for i, size in enumerate(sizes)]
        await asyncio.gather(*sends)
        await pair.far_side.until(lambda: len(pair.far_side.messages) == len(sizes))
        assert pair.far_side.messages == [(Note(number=i), bytearray([i]) * size) for i, size in enumerate(sizes)]


async def test_large_payloads_cross_unharmed_both_ways_at_once():
    async with two_nodes() as pair:
        near, far = await pair.dial()
        there, back = os.urandom(32 << 20), os.urandom(32 << 20)
        (_, first), (_, second) = await asyncio.gather(
            near.request(Note("echo"), there), far.request(Note("echo"), back)
        )
        assert hashlib.sha256(first).digest() == hashlib.sha256(there).digest()
        assert hashlib.sha256(second).digest() == hashlib.sha256(back).digest()


async def test_a_large_payload_leaves_the_loop_its_turns():
    # The loop must get a turn every 192 KB: 32 MB both sent and received in this one process are over 300
    # turns.
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counter = asyncio.create_task(count())
        await near.send(Note(), bytes(32 << 20))
        await pair.far_side.until(lambda: pair.far_side.messages)
        counter.cancel()
        assert turns > 150


async def test_requests_are_answered_each_with_its_own_reply():
    async with two_nodes() as pair:
        near, far = await pair.dial()
        replies = await asyncio.gather(
            *(link.request(Note(str(i)), b"." * i) for i in range(50) for link in (near, far))
        )
        assert [(note(reply).text, note(reply).number) for reply, _ in replies] == [
            (str(i), i) for i in range(50) for _ in (near, far)
        ]
        assert await near.request(Note("plain")) == (Note("plain"), bytearray())


async def test_refusals_arrive_as_they_were_raised(caplog):
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        with pytest.raises(RemoteError) as refused:
            await near.request(Note("refuse"))
        assert (refused.value.code, refused.value.message) == ("teapot", "short and stout")
        with pytest.raises(RemoteError) as crashed:
            await near.request(Note("crash"))
        assert crashed.value.code == "internal"
        assert "secret" not in crashed.value.message
        assert "secret detail" in caplog.text  # the side that failed keeps the whole story
        with pytest.raises(RemoteError, match="cancelled there"):
            await near.request(Note("spontaneous"))
        assert not near.closed


async def test_a_request_that_times_out_is_cancelled_there_and_the_link_goes_on():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        with pytest.raises(TimeoutError, match=r"far did not answer Note within 0\.05 s"):
            await near.request(Note("hang"), timeout=0.05)
        await pair.far_side.until(lambda: pair.far_side.requests_cancelled == 1)
        assert (await near.request(Note("plain")))[0] == Note("plain")


async def test_too_many_requests_at_once_are_refused_and_the_rest_are_not_harmed(monkeypatch):
    monkeypatch.setattr(exchanges, "MAX_ANSWERING", 4)
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        hanging = [asyncio.create_task(near.request(Note("hang"), timeout=None)) for _ in range(4)]
        await pair.far_side.until(lambda: pair.far_side.requests_hanging == 4)
        with pytest.raises(RemoteError) as refused:
            await near.request(Note("plain"))
        assert refused.value.code == "busy"
        for task in hanging:
            task.cancel()
        await pair.far_side.until(lambda: pair.far_side.requests_cancelled == 4)
        assert (await near.request(Note("plain")))[0] == Note("plain")


async def test_payloads_being_answered_are_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(exchanges, "MAX_ANSWERING_BYTES", 1000)
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        with pytest.raises(RemoteError, match="busy"):
            await near.request(Note(), bytes(1001))
        assert note((await near.request(Note(), bytes(1000)))[0]).number == 1000


async def test_a_stream_gives_every_item_once_in_order():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        async with near.stream(Count(5 * STREAM_WINDOW + 3)) as items:
            assert [note(item).number async for item in items] == list(range(5 * STREAM_WINDOW + 3))


async def test_a_stream_that_fails_gives_what_came_before_and_then_the_refusal():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        got = []

        async def read() -> None:
            async with near.stream(Count(100), b"fail") as items:
                async for item in items:
                    got.append(note(item).number)

        with pytest.raises(RemoteError) as refused:
            await read()
        assert got == list(range(13))
        assert refused.value.code == "unlucky"


async def test_leaving_a_stream_early_ends_it_on_the_other_side():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        async with near.stream(Count(10**9)) as items:
            async for item in items:
                if note(item).number == 3:
                    break
        await pair.far_side.until(lambda: pair.far_side.streams_ended == 1)
        assert (await near.request(Note("plain")))[0] == Note("plain")


async def test_a_slow_reader_holds_up_its_own_stream_and_nothing_else():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        async with near.stream(Count(10**9)) as slow:
            await anext(slow)
            # Nobody reads the slow stream now; everything else on the link goes on, and what waits is
            # bounded.
            for i in range(200):
                await near.request(Note(str(i)))
            assert len(slow._items) <= STREAM_WINDOW
            async with near.stream(Count(1000)) as quick:
                assert [note(item).number async for item in quick] == list(range(1000))
            assert len(slow._items) <= STREAM_WINDOW


async def test_a_cancelled_read_loses_no_item():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        got = []
        async with near.stream(Count(3), b"") as items:
            while len(got) < 3:
                try:
                    async with asyncio.timeout(0.0001):
                        got.append(note(await anext(items)).number)
                except TimeoutError:
                    continue
        assert got == [0, 1, 2]


async def test_back_pressure_reaches_the_sender():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        pair.far_side.gate.clear()
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for _ in range(64):
                await near.send(Note(), bytes(1 << 20))
                sent += 1

        flooding = asyncio.create_task(flood())
        await until_blocked(near)
        # Socket buffers take a few megabytes, then the sender waits for the reader.
        assert not flooding.done()
        assert sent < 48
        pair.far_side.gate.set()
        await flooding
        await pair.far_side.until(lambda: len(pair.far_side.messages) == 64)


async def test_two_links_between_the_same_nodes_are_independent():
    async with two_nodes() as pair:
        (first, _), (second, _) = await pair.dial(), await pair.dial()
        await first.close("only this one")
        assert (await second.request(Note("plain")))[0] == Note("plain")
        assert pair.near.links == (second,)


async def test_the_socket_is_tuned_for_small_messages():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        raw = near._sock._tls
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert raw.version() == "TLSv1.3"


async def test_what_cannot_be_sent_is_said_to_the_sender_and_harms_nothing():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        with pytest.raises(FrameError, match="split it"):
            await near.send(Note(), bytes(MAX_PAYLOAD + 1))
        with pytest.raises(TypeError, match="not in this link's vocabulary"):
            await near.send(Hello(1, "probe", "x", "y"))
        assert (await near.request(Note("plain")))[0] == Note("plain")


async def test_a_handler_that_fails_on_a_message_costs_that_message_only(caplog):
    class Clumsy(Recorder):
        async def on_message(self, link: Link, message, payload) -> None:
            if note(message).text == "drop":
                raise ValueError("dropped it")
            await super().on_message(link, message, payload)

    async with two_nodes() as pair:
        clumsy = Clumsy()
        pair.far._handler = clumsy
        near = await pair.near.dial("127.0.0.1", pair.port)
        await near.send(Note("drop"))
        await near.send(Note("kept"))
        await clumsy.until(lambda: clumsy.messages)
        assert clumsy.messages == [(Note("kept"), bytearray())]
        assert "dropped it" in caplog.text


def test_a_vocabulary_needs_distinct_tags():
    from msgspec import Struct

    class Untagged(Struct):
        pass

    class Twin(Struct, tag="note"):
        pass

    for classes in ((), (Untagged,), (Note, Twin)):
        with pytest.raises(ValueError, match="tags"):
            Vocabulary(classes)


async def test_a_closed_link_says_why():
    async with two_nodes() as pair:
        near, far = await pair.dial()
        await near.close("we are moving house")
        assert near.close_reason == "we are moving house"
        await far.wait_closed()
        assert far.close_reason == "the other side closed the link: we are moving house"
        for link in (near, far):
            with pytest.raises(LinkClosed, match="moving house"):
                await link.send(Note())
            with pytest.raises(LinkClosed, match="moving house"):
                await link.request(Note())
            with pytest.raises(LinkClosed, match="moving house"):
                async with link.stream(Count(1)):
                    pass
        assert [len(side.closed) for side in (pair.near_side, pair.far_side)] == [1, 1]
