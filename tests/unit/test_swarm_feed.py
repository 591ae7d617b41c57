"""The public state feed: all of it at once, every change soon, and silence while nothing changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from support.fake_node import MODEL, FakeNode, serving

from swarmd.node.api import server, swarm
from swarmd.node.cluster.signal import Signal
from swarmd.node.models.progress import Progress
from swarmd.node.progress_board import ProgressBoard
from swarmd.node.serving.generation import GenerationError


class Feed:
    """A client of `/api/events`."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def block(self) -> str:
        """The next event or comment as it is."""
        async with asyncio.timeout(10):
            return (await self.response.content.readuntil(b"\n\n")).decode().rstrip("\n")

    async def next(self) -> tuple[str, Any]:
        """The next event as (event, data)."""
        event, data = (await self.block()).split("\n")
        return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))


@asynccontextmanager
async def listening(node: FakeNode) -> AsyncIterator[Feed]:
    async with serving(node) as url, aiohttp.ClientSession() as session, session.get(f"{url}/api/events") as response:
        assert response.content_type == "text/event-stream"
        yield Feed(response)


async def test_the_state_comes_at_once_and_again_when_it_changes():
    node = FakeNode()
    async with listening(node) as feed:
        assert await feed.next() == ("swarm", {"nodes": [], "instances": []})
        for name in ("attic", "kitchen"):
            node.state = {"nodes": [name], "instances": []}
            node.changed.notify()
            assert await feed.next() == ("swarm", {"nodes": [name], "instances": []})


async def test_a_signal_without_a_change_sends_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(swarm, "FEED_SECONDS", 0.0)
    node = FakeNode()
    async with listening(node) as feed:
        await feed.next()
        for _ in range(5):
            node.changed.notify()
            await asyncio.sleep(0)
        node.state = {"nodes": ["last"], "instances": []}
        node.changed.notify()
        assert await feed.next() == ("swarm", {"nodes": ["last"], "instances": []})


async def test_a_change_between_two_looks_is_not_missed():
    node = FakeNode()
    async with listening(node) as feed:
        await feed.next()
        # The feed pauses after each event: nobody waits for this signal.
        node.state = {"nodes": ["quick"], "instances": []}
        assert await feed.next() == ("swarm", {"nodes": ["quick"], "instances": []})


async def test_a_quiet_feed_shows_that_it_lives(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(swarm, "FEED_SECONDS", 0.0)
    monkeypatch.setattr(swarm, "KEEPALIVE_SECONDS", 0.01)
    async with listening(FakeNode()) as feed:
        await feed.next()
        assert await feed.block() == ": still here"


async def test_downloads_are_told_as_they_go_on():
    node = FakeNode()
    async with listening(node) as feed:
        await feed.next()
        for done in (10, 60):
            node.under_way = (Progress("m", done, 100, "download"),)
            node.changed.notify()
            event, data = await feed.next()
            assert (event, data["done_bytes"], data["phase"]) == ("progress", done, "download")


async def test_a_server_that_closes_ends_its_feeds(monkeypatch: pytest.MonkeyPatch):
    # So long would it wait for an answer that does not end by itself.
    monkeypatch.setattr(server, "SHUTDOWN_SECONDS", 300.0)
    async with asyncio.timeout(30), aiohttp.ClientSession() as session:
        async with serving(FakeNode()) as url:
            response = await session.get(f"{url}/api/events")
            await Feed(response).next()
        assert await response.content.read() == b""


async def test_launching_tells_the_name_in_the_swarm():
    node = FakeNode()
    async with serving(node) as url, aiohttp.ClientSession() as session:
        async with session.post(f"{url}/api/instances", json={"model": "/x/model.gguf"}) as response:
            assert (response.status, await response.json()) == (202, {"model": MODEL})
        node.refusal = GenerationError("invalid_request", "no GGUF file", param="model")
        async with session.post(f"{url}/api/instances", json={"model": "/x/y.gguf"}) as response:
            assert response.status == 400
            assert (await response.json())["error"]["message"] == "no GGUF file"


async def test_health_names_the_models_that_answer():
    node = FakeNode()
    node.state = {"instances": [{"model": "a", "state": "ready"}, {"model": "b", "state": "loading"}]}
    async with serving(node) as url, aiohttp.ClientSession() as session, session.get(f"{url}/health") as response:
        assert await response.json() == {"status": "ok", "ready": ["a"]}


class TestProgressBoard:
    def test_what_is_done_is_no_longer_under_way(self):
        board = ProgressBoard(Signal())
        board.report(Progress("m", 10, 100, "download"))
        assert board.current == (Progress("m", 10, 100, "download"),)
        board.report(Progress("m", 100, 100, "download"))
        assert board.current == ()

    def test_a_download_of_unknown_size_is_under_way(self):
        board = ProgressBoard(Signal())
        board.report(Progress("m", 5_000_000, 0, "download"))
        assert board.current == (Progress("m", 5_000_000, 0, "download"),)

    def test_a_download_that_fell_silent_is_forgotten(self, monkeypatch: pytest.MonkeyPatch):
        board = ProgressBoard(Signal())
        board.report(Progress("m", 10, 100, "download"))
        monkeypatch.setattr("swarmd.node.progress_board.SILENT_SECONDS", -1.0)
        assert board.current == ()

    def test_a_storm_of_reports_is_a_few_lines(self, caplog: pytest.LogCaptureFixture):
        caplog.set_level("INFO", "swarmd.models")
        board = ProgressBoard(Signal())
        for done in range(1001):
            board.report(Progress("m", done, 1000, "verify"))
        assert [record.getMessage() for record in caplog.records] == ["m: verify 0%", "m: verify 100%"]
