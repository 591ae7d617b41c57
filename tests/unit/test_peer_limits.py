"""What one member can make another process hold: links, and answers that it does not read."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from msgspec import Struct
from support.link_fakes import Note, Pair, eventually, two_nodes

from swarmd.transport import endpoint
from swarmd.transport.endpoint import MAX_LINKS_OF_NODE, LinkRefused
from swarmd.transport.exchanges import MAX_UNREAD_BYTES, Answering
from swarmd.transport.frames import Flow
from swarmd.transport.messages import RemoteError


async def one_too_many(pair: Pair) -> None:
    """A link that the other side does not take: the dialler hears so at once, or sees it end."""
    with contextlib.suppress(LinkRefused):
        link = await pair.near.dial("127.0.0.1", pair.port)
        async with asyncio.timeout(10):
            await link.wait_closed()


async def test_one_node_has_a_bounded_number_of_links_with_a_process(caplog: pytest.LogCaptureFixture):
    async with two_nodes() as pair:
        links = [(await pair.dial())[0] for _ in range(MAX_LINKS_OF_NODE)]
        await one_too_many(pair)
        assert len(pair.far.links) == MAX_LINKS_OF_NODE
        assert f"has {MAX_LINKS_OF_NODE} links with this process already" in caplog.text
        reply, _ = await links[0].request(Note("plain"))
        assert reply == Note("plain"), "the links that are there do not suffer"
        await links[0].close("enough")
        await eventually(lambda: len(pair.far.links) < MAX_LINKS_OF_NODE)
        await pair.dial()


async def test_all_nodes_together_have_a_bounded_number_of_links(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint, "MAX_LINKS", 2)
    async with two_nodes() as pair:
        for _ in range(2):
            await pair.dial()
        await one_too_many(pair)
        assert len(pair.far.links) == 2


async def test_answers_that_nobody_reads_take_a_bounded_amount_of_memory():
    """The network takes nothing: beyond the bound an answer is dropped, and the asker told that it asked too much."""
    sent: list[int] = []
    refused: dict[int, RemoteError] = {}
    reads = asyncio.Event()

    async def send(flow: Flow, exchange_id: int, message: Struct, payload: Any) -> None:
        sent.append(exchange_id)
        await reads.wait()

    async def never(*_: object) -> None:
        raise AssertionError

    answering = Answering(send, never, refused.__setitem__, lambda _: None)
    chunk = bytes(MAX_UNREAD_BYTES // 4)

    async def answer() -> tuple[Struct, bytes]:
        return Note("chunk"), chunk

    for number in range(1, 10):
        answering.request(number, 0, answer)
    await eventually(lambda: len(refused) == 5)
    assert sent == [1, 2, 3, 4]
    assert {error.code for error in refused.values()} == {"busy"}
    reads.set()
    await asyncio.gather(*answering.running())
    answering.request(10, 0, answer)
    await asyncio.gather(*answering.running())
    assert sent[-1] == 10, "whoever reads again is answered again"


async def test_a_single_answer_may_be_larger_than_the_bound():
    sent: list[int] = []

    async def send(flow: Flow, exchange_id: int, message: Struct, payload: Any) -> None:
        sent.append(len(payload))

    answering = Answering(send, send, lambda _, error: pytest.fail(str(error)), lambda _: None)  # type: ignore[arg-type]

    async def answer() -> tuple[Struct, bytes]:
        return Note("chunk"), bytes(MAX_UNREAD_BYTES + 1)

    answering.request(1, 0, answer)
    await asyncio.gather(*answering.running())
    assert sent == [MAX_UNREAD_BYTES + 1]
