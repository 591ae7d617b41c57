"""Clients that do not read, and streams that pause, over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import aiohttp
from support.fake_node import MODEL, FakeNode, piece, serving

from swarmd.node.api.event_stream import StreamLimits
from swarmd.node.serving.generation import Ending, GenerationError

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "?"}], "stream": True}
LONG = piece("x" * (1 << 20))


@asynccontextmanager
async def silent_client(url: str):
    """A client that asks for an answer and reads nothing of it."""
    body = json.dumps(BODY).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.setblocking(False)
    try:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(made, ("127.0.0.1", urlsplit(url).port))
        await loop.sock_sendall(made, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield
    finally:
        made.close()


async def test_a_client_that_does_not_read_is_dropped_and_its_generation_cancelled():
    node = FakeNode(*[LONG] * 100, Ending("stop", 7, 100))
    async with serving(node, limits=StreamLimits(unread=0.3)) as url, silent_client(url), asyncio.timeout(20):
        await node.left.wait()


async def test_a_client_that_does_not_read_holds_up_nobody():
    node = FakeNode(*[LONG] * 30, Ending("stop", 7, 30))
    async with serving(node, limits=StreamLimits(unread=30)) as url, silent_client(url), asyncio.timeout(20):
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/chat/completions", json=BODY) as answer,
        ):
            text = await answer.text()
        assert text.endswith("data: [DONE]\n\n")
        assert len(text) > 30 << 20
        assert not node.left.is_set(), "the one that does not read has its time"


async def test_comments_fill_the_silence_of_a_stream_that_has_begun():
    node = FakeNode()
    node.hold.clear()
    async with (
        serving(node, limits=StreamLimits(quiet=0.02)) as url,
        aiohttp.ClientSession() as session,
        asyncio.timeout(20),
        session.post(f"{url}/v1/chat/completions", json=BODY) as answer,
    ):
        lines: list[str] = []
        comments = 0
        async for line in answer.content:
            lines.append(line.decode().rstrip("\n"))
            comments += lines[-1].startswith(":")
            if comments == 3:
                node.hold.set()
    data = [line.removeprefix("data: ") for line in lines if line and not line.startswith(":")]
    assert data.pop() == "[DONE]"
    assert "".join(json.loads(one)["choices"][0]["delta"].get("content", "") for one in data) == "Paris."
    assert comments >= 3
    events = [event for event in "\n".join(lines).split("\n\n") if event.startswith(":")]
    assert len(events) == comments, "each stands alone, between events"


async def test_nothing_is_sent_before_the_first_token_so_that_a_refusal_keeps_its_status():
    node = FakeNode(GenerationError("overloaded", "full", retry_after=2, unavailable=True))
    async with (
        serving(node, limits=StreamLimits(quiet=0.001)) as url,
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=BODY) as answer,
    ):
        assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
