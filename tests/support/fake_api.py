"""A fake of a node's HTTP API, for tests of the web page alone: no node, no model, no swarm stands behind it.

It serves the really built page under the daemon's Content-Security-Policy, and in place of the rest says
what the test puts in: the state of the swarm (`publish`), and the pieces of the next answers
(`answer_pieces`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType

from aiohttp import web

from swarmd.dashboard.assets import CONTENT_SECURITY_POLICY

Json = dict[str, object]
Piece = str | Json


class FakeApi:
    """An HTTP server on a free loopback port; an async context manager.

    `answer_pieces`: the `data:` of the next answer, in order; a `str` is wrapped as a content delta, a dict
    is sent as it is. `hold`: while cleared, an answer waits after its pieces and before its end. `requests`:
    the bodies of all chat requests. `client_left`: set when a client goes away in the middle of an answer.
    `api_key`: when not empty, `/api` and `/v1` want it.
    """

    def __init__(self, static: Path, swarm: Json) -> None:
        self.static = static
        self.swarm = swarm
        self.answer_pieces: list[Piece] = ["Paris", "."]
        self.api_key = ""
        self.requests: list[Json] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.client_left = asyncio.Event()
        self.feeds: set[asyncio.Queue[tuple[str, Json] | None]] = set()
        self._runner: web.AppRunner | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self._port}/"

    def publish(self, swarm: Json) -> None:
        """The new state, sent to every page that listens."""
        self.swarm = swarm
        self.send("swarm", swarm)

    def send(self, event: str, body: Json) -> None:
        """Any event, to every page that listens."""
        for feed in self.feeds:
            feed.put_nowait((event, body))

    async def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/", self._index)
        app.router.add_get("/api/swarm", self._swarm)
        app.router.add_get("/api/events", self._events)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_static("/", self.static)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def stop(self) -> None:
        """Close every connection, as a node that ends does."""
        for feed in self.feeds:
            feed.put_nowait(None)
        self.hold.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> FakeApi:
        await self.start()
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        guarded = request.path.startswith(("/api", "/v1"))
        if guarded and self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "the API key is missing or wrong"}}, status=401)
        response = await handler(request)
        if not response.prepared:
            response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        return response

    async def _index(self, _request: web.Request) -> web.FileResponse:
        return web.FileResponse(self.static / "index.html")

    async def _swarm(self, _request: web.Request) -> web.Response:
        return web.json_response(self.swarm)

    async def _models(self, _request: web.Request) -> web.Response:
        instances = self.swarm["instances"]
        assert isinstance(instances, list)
        names = [instance["model"] for instance in instances if instance["state"] == "ready"]
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        feed: asyncio.Queue[tuple[str, Json] | None] = asyncio.Queue()
        feed.put_nowait(("swarm", self.swarm))
        self.feeds.add(feed)
        try:
            while (item := await feed.get()) is not None:
                event, body = item
                await response.write(f"event: {event}\ndata: {json.dumps(body)}\n\n".encode())
        finally:
            self.feeds.discard(feed)
        return response

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for piece in self.answer_pieces:
                chunk = {"choices": [{"index": 0, "delta": {"content": piece}}]} if isinstance(piece, str) else piece
                await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            await self.hold.wait()
            if not any(isinstance(piece, dict) and "error" in piece for piece in self.answer_pieces):
                await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.client_left.set()
            raise
        return response
