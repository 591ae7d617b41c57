"""What makes a link quick, and that none of it changes what arrives: messages without a change of tasks, sending
without waiting, and items that go out together."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.link_fakes import Count, Note, Recorder, eventually, note, two_nodes, until_blocked

from swarmd.transport.link import Link, LinkClosed


class QuickReader(Recorder):
    """Takes messages in a plain function."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []
        self.tasks: set[asyncio.Task[Any] | None] = set()

    def on_message(self, link: Link, message: Any, payload: bytearray) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if note(message).text == "fail":
            raise ValueError("dropped it")
        self.numbers.append(message.number)
        self.tasks.add(asyncio.current_task())


async def test_a_plain_function_is_called_from_the_loop_and_in_order():
    async with two_nodes() as pair:
        reader = pair.far._handler = QuickReader()
        near = await pair.near.dial("127.0.0.1", pair.port)
        for number in range(200):
            await near.send(Note(number=number), bytes(number * 100))
        await eventually(lambda: len(reader.numbers) == 200)
        assert reader.numbers == list(range(200))
        assert None in reader.tasks  # no task was woken for these


async def test_a_plain_function_that_fails_costs_its_message_only(caplog):
    async with two_nodes() as pair:
        reader = pair.far._handler = QuickReader()
        near = await pair.near.dial("127.0.0.1", pair.port)
        await near.send(Note("fail"))
        await near.send(Note(number=1))
        await eventually(lambda: reader.numbers)
        assert "dropped it" in caplog.text


async def test_frames_sent_without_waiting_keep_their_order_with_all_others():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        for number in range(0, 60, 3):
            near.send_soon(Note(number=number))
            near.send_soon(near.encode(Note(number=number + 1)), bytes(300_000))
            await near.send(Note(number=number + 2))
        await pair.far_side.until(lambda: len(pair.far_side.messages) == 60)
        assert [note(message).number for message, _ in pair.far_side.messages] == list(range(60))
        assert [len(payload) for _, payload in pair.far_side.messages[:3]] == [0, 300_000, 0]


async def test_sending_without_waiting_is_bounded_and_refused_on_a_closed_link():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        pair.far_side.gate.clear()
        await near.send(Note())
        blocked = asyncio.create_task(near.send(Note(), bytes(60 << 20)))
        await until_blocked(near)

        def flood() -> None:
            for _ in range(2000):
                near.send_soon(Note())

        with pytest.raises(LinkClosed, match="asks more than it reads"):
            flood()
        with pytest.raises(LinkClosed):
            await blocked
        pair.far_side.gate.set()


class Chorus(Recorder):
    """Answers streams with an item whenever it is told to, all streams in the same turn of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.ready: list[asyncio.Queue[int]] = []

    async def on_stream(self, link: Link, message: Any, payload: bytearray):
        queue: asyncio.Queue[int] = asyncio.Queue()
        self.ready.append(queue)
        while (number := await queue.get()) >= 0:
            yield Note(number=number)


async def test_items_of_one_turn_go_out_in_one_write_and_a_lone_one_at_once():
    async with two_nodes() as pair:
        chorus = pair.far._handler = Chorus()
        near = await pair.near.dial("127.0.0.1", pair.port)
        async with near.stream(Count(0)) as first, near.stream(Count(0)) as second, near.stream(Count(0)) as third:
            streams = (first, second, third)
            await eventually(lambda: len(chorus.ready) == 3)
            (far,) = chorus.links
            writes: list[int] = []
            send_now = far._sock.send_now

            def counting(data: Any) -> int:
                writes.append(len(data))
                return send_now(data)

            far._sock.send_now = counting  # type: ignore[method-assign]
            for number in range(3):
                for queue in chorus.ready:
                    queue.put_nowait(number)
                assert [note(await anext(stream)).number for stream in streams] == [number] * 3
                assert len(writes) == number + 1
            chorus.ready[0].put_nowait(7)
            assert note(await anext(first)).number == 7
            for queue in chorus.ready:
                queue.put_nowait(8)
                queue.put_nowait(-1)
            for stream in streams:  # the last item and the end come together, and both arrive
                assert [note(item).number async for item in stream] == [8]


async def test_items_that_have_arrived_can_be_taken_together_within_the_window():
    async with two_nodes() as pair:
        near, _ = await pair.dial()
        got: list[int] = []
        async with near.stream(Count(1000)) as items:
            async for item in items:
                got += [note(each).number for each in (item, *items.arrived())]
        assert got == list(range(1000))
